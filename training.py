"""A run's plumbing, which no paper defines: processes, optimizer, flags, checkpoints, log."""
import argparse
import contextlib
import datetime
import fcntl
import functools
import hashlib
import importlib.util
import inspect
import json
import math
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
import traceback
from collections import Counter
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F

import common
from common import ARCHITECTURES, Batch, Batches, UserError, Views, open_data, seed_of

FEW_IMAGES = 100_000  # data without a recipe of its own gets `small` below, and else imagenet's
TIMEOUT = datetime.timedelta(minutes=30)  # a slow disk can keep one process that long
VOTE_EVERY = 10  # steps between two votes of several processes on saving and stopping
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
CURE = "not saved; try a lower --base-lr or --no-bf16, under another --name"  # of NaN
# Flags that may differ between a run and its resumption, and between its processes.
FREE = ("data", "init", "out", "name", "recipe", "workers", "save_minutes", "keep_every",
        "log_every", "max_megapixels", "code")

# --- 1. Optimization ------------------------------------------------------------------------------

class LARS(torch.optim.SGD):
    """SGD that scales each weight matrix's gradient to eta times the matrix's norm (1708.03888).
    Biases and normalization are neither decayed nor scaled. Overwrites the gradients."""

    def __init__(self, params, lr=0.0, weight_decay=0.0, momentum=0.9, eta=0.001):
        super().__init__(params, lr, momentum, fused=True)
        for group in self.param_groups:
            group.update(decay=weight_decay, eta=eta)  # SGD's own decay would take biases too

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            matrices = [p for p in group["params"] if p.grad is not None and p.ndim > 1]
            if matrices:
                grads = [p.grad for p in matrices]
                torch._foreach_add_(grads, matrices, alpha=group["decay"])
                w = torch.stack(torch._foreach_norm(matrices))
                g = torch.stack(torch._foreach_norm(grads))
                ratio = torch.where((w > 0) & (g > 0), group["eta"] * w / g, 1.0)
                torch._foreach_mul_(grads, ratio.unbind())
        super().step()


def cosine_schedule(step, total, warmup, peak, final):
    """Linear from 0 to `peak` in `warmup` steps, then half a cosine to `final` at step `total`."""
    if step < warmup:
        return peak * step / warmup
    progress = (step - warmup) / (total - warmup)
    return final + 0.5 * (peak - final) * (1 + math.cos(math.pi * progress))


def probe(logits, labels):
    """Loss and accuracy of logits (B, C), or None, for labels (B,), of which -1 is unknown."""
    if logits is None:
        return 0.0, {}
    known = (labels >= 0).sum().clamp(min=1)
    loss = F.cross_entropy(logits.float(), labels, ignore_index=-1, reduction="sum") / known
    return loss, {"accuracy": (logits.argmax(1) == labels).sum() / known}


# --- 2. Processes ---------------------------------------------------------------------------------

def rank_and_world():
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def fresh_store(store, rank, world):
    """torchrun's store without what an earlier start left in it. Each process puts a random name
    into a list, which is this start's prefix as soon as all have read the same list."""
    store.set(f"name {rank}", os.urandom(4).hex())
    prefix = ""
    while not prefix or store.add(prefix, 0) < world:  # how many have read this list
        names = b"".join(store.multi_get([f"name {r}" for r in range(world)])).decode()
        if names != prefix:
            prefix = names
            store.add(prefix, 1)
        time.sleep(0.02)
    return dist.PrefixStore(prefix, store)


def set_up(seed):
    """Seeds; joins torchrun's process group, if there is one (NCCL on GPUs, gloo) -> the device."""
    torch.manual_seed(seed)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        store, rank, world = next(dist.rendezvous("env://", timeout=TIMEOUT))
        store = fresh_store(store, rank, world)
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"  # by a tensor's device
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=TIMEOUT)
    return device


def distribute(model, device):
    """The model on its device, channels_last, and the same in DDP, BatchNorm over all processes."""
    model = model.to(device, memory_format=torch.channels_last)
    if not dist.is_initialized():
        return model, model
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.__class__ = GlobalBatchNorm  # parameters and their names stay
    ddp = torch.nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    ddp.broadcast_buffers = False  # they stay equal by themselves
    return model, ddp


class GlobalBatchNorm(torch.nn.modules.batchnorm._BatchNorm):
    """BatchNorm over the batches of all processes, which must be of one size. As torch's
    SyncBatchNorm, but also on the CPU, and without its host syncs."""

    @torch.compiler.disable  # --compile leaves the collectives out
    def forward(self, x):
        running = self.running_mean, self.running_var
        if not self.training:
            return F.batch_norm(x, *running, self.weight, self.bias, eps=self.eps)
        self.num_batches_tracked.add_(1)
        if x.is_cuda:
            return BatchNormOnCUDA.apply(x, self.weight, self.bias, *running, self.eps,
                                         self.momentum, dist.group.WORLD, dist.get_world_size())
        z = x.to(self.weight.dtype).transpose(1, -1)  # (B, ..., C)
        dims = tuple(range(z.ndim - 1))
        mean = MeanOfAll.apply(z.mean(dims))  # (C,)
        z = z - mean
        var = MeanOfAll.apply(z.square().mean(dims))
        n = dist.get_world_size() * z[..., 0].numel()
        self.running_mean.lerp_(mean.detach(), self.momentum)
        self.running_var.lerp_(var.detach() * n / (n - 1), self.momentum)
        z = z * (self.weight * torch.rsqrt(var + self.eps)) + self.bias
        return z.transpose(1, -1).to(x.dtype)


class MeanOfAll(torch.autograd.Function):
    """The mean of x over processes, whose losses differ: so the gradient is averaged as well."""

    @staticmethod
    def forward(ctx, x):
        mean = x / dist.get_world_size()
        dist.all_reduce(mean)
        return mean

    backward = forward


@functools.cache  # so that no layer launches a kernel for it
def filled(size, number, dtype, device):
    return torch.full((size,), number, dtype=dtype, device=device)


class BatchNormOnCUDA(torch.nn.modules._functions.SyncBatchNorm):
    """GlobalBatchNorm by fused kernels: a tenth of the launches. Only the forward pass of torch's
    SyncBatchNorm waits for the GPU, in search of empty batches. Its backward pass is used as is."""

    @staticmethod
    def forward(ctx, x, weight, bias, running_mean, running_var, eps, momentum, group, world):
        local = torch.cat(torch.batch_norm_stats(x, eps))  # (2C,): mean, 1 / deviation
        every = local.new_empty(world * len(local))
        dist.all_gather_into_tensor(every, local, group)
        means, scales = every.view(world, 2, -1).unbind(1)  # (G, C) each
        number = x.numel() // x.shape[1]  # of values, in each process
        mean, scale = torch.batch_norm_gather_stats_with_counts(
            x, means, scales, running_mean, running_var, momentum, eps,
            filled(world, number, local.dtype, x.device))
        ctx.save_for_backward(x, weight, mean, scale, filled(world, number, torch.int32, x.device))
        ctx.process_group = group
        return torch.batch_norm_elemt(x, weight, bias, mean, scale, eps)


# --- 3. Command line ------------------------------------------------------------------------------

def has_bf16():
    """Whether bfloat16 is fast here: on GPUs and CPUs with instructions for it."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(getattr(torch.cpu, "get_capabilities", dict)().get("avx512_bf16"))


def own_cores():
    """Cores for this process's data workers, 12 at most. Without a GPU the other half computes."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cores = cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return min(12, cores if torch.cuda.is_available() else cores // 2)


class Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """The header as it stands, and each flag's default."""


def choose_recipe(args, recipes):
    """The recipe that gives flags their defaults: --recipe's, or that of --arch or its family (as
    convnext), or of --data by its name, or by the number of its images. Raises UserError."""
    family = (args.arch or "").split("_")[0]
    for name in (args.recipe, args.arch, family, Path(args.data).name):
        if name in recipes:
            return name
    if "small" in recipes and (args.data in common.DOWNLOADS
                               or len(open_data(args.data)) < FEW_IMAGES):
        return "small"
    return "imagenet"


def parse_args(parser, recipes, limits):
    """The flags, with a recipe's defaults. limits: {flag: (lowest, highest)}, else 0 and more.
    Raises UserError."""
    flag = parser.add_argument
    flag("--data", default="shapes", help="or cifar10, cifar100, stl10, voc, a folder of images")
    flag("--recipe", choices=recipes, help="defaults of other flags; else by --arch and --data")
    flag("--arch", type=lambda name: name.removesuffix("_224"), help=", ".join(ARCHITECTURES))
    flag("--init", metavar="WEIGHTS", help="backbone to start from: a run, or a file of weights")
    flag("--size", type=int, help="side of a view in pixels")
    flag("--epochs", type=int, help="passes over the data")
    flag("--batch-size", type=int, help="images of a step, of all processes together")
    flag("--base-lr", type=float, help="the peak learning rate is base-lr * batch-size / 256")
    flag("--final-lr", type=float, help="learning rate of the last step")
    flag("--weight-decay", type=float, help="of weight matrices")
    flag("--warmup-epochs", type=int, help="epochs in which the learning rate rises to its peak")
    flag("--seed", type=int, default=0, help="of all that is random")
    flag("--bf16", action=argparse.BooleanOptionalAction, help="by default where it is fast")
    flag("--compile", action="store_true", help="the backbones, by torch.compile")
    flag("--workers", type=int, default=own_cores(), help="data loading processes")
    flag("--out", default="runs", help="folder of all runs")
    flag("--name", help="this run's folder in --out")
    flag("--save-minutes", type=float, default=10, help="minutes between checkpoints")
    flag("--keep-every", type=int, default=0, help="epochs between backbones to keep; 0: none")
    flag("--log-every", type=int, default=50, help="steps between log lines")
    flag("--max-megapixels", type=float, default=50, help="larger images count as broken")
    parser.formatter_class = Help
    words = [word for word in sys.argv[1:] if word not in ("-h", "--help")]
    known, _ = parser.parse_known_args(words)
    recipe = choose_recipe(known, recipes)
    name = f"{Path(sys.argv[0]).stem}-{Path(known.data).name}"
    parser.set_defaults(**recipes[recipe], recipe=recipe, name=name)

    args = parser.parse_args()
    counts = ("size", "epochs", "batch_size", "log_every", "max_megapixels")
    limits = dict.fromkeys(counts, (1, math.inf)) | limits
    for key, value in vars(args).items():
        low, high = limits.get(key, (0, math.inf))
        values = value if isinstance(value, list) else [value]
        if any(isinstance(v, int | float) and not low <= v <= high for v in values):
            flag = key.replace("_", "-")
            raise UserError(f"--{flag} {value}: it must be at least {low} and at most {high}")
    common.MAX_PIXELS = 1e6 * args.max_megapixels
    return args


def build_backbone(args):
    """The backbone of --arch for --size, with the weights of --init if given. Raises UserError."""
    drop_path = vars(args).get("drop_path", 0.0)  # a flag of some methods
    if args.init is None:
        return common.build_backbone(args.arch, args.size, drop_path)
    from weights import load_backbone
    return load_backbone(args.init, args.arch, drop_path).train()


def printable(text):
    """The same on one line: control characters and bytes that are no text are escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))


def say(text, file=None, end="\n"):
    """print(), but a full disk or a closed pipe does not end a run: from then on it is silent."""
    file = file or sys.stdout
    if file.isatty():
        text = f"\r\033[K{text}"  # in the place of a line of progress
    try:
        print(text, file=file, end=end, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), file.fileno())


def warn(message):
    say(f"warning: {printable(message)}", sys.stderr)


def report(error):
    """Says on stderr what ends this process, a bug with its traceback -> the exit code."""
    if isinstance(error, ModuleNotFoundError):
        error = UserError(f"{error}: copy that file here, or install it")
    message = str(error).rpartition("UserError: ")[2].strip()  # after a data worker's traceback
    # torch raises the loss of a worker amid whatever this process is at.
    lost = re.search(r"DataLoader (worker \(pid|timed out).*", f"{error} {error.__context__}")
    if lost:
        message = f"a data worker died or hung ({lost[0]}); try docker's --shm-size or --workers"
    if os.environ.get("RANK", "0") != "0":
        time.sleep(2)  # what all processes meet, the first one says: then torchrun ends all
    if lost or isinstance(error, UserError):
        say(f"error: {printable(message)}", sys.stderr)
        return 2
    traceback.print_exception(error)
    return 1


@contextlib.contextmanager
def orderly_exit():
    """Around a main(): what ends it is reported, and gives the exit code. Kills data workers, which
    Python would wait for, and leaves several processes at once: torchrun ends the others."""
    code = 0
    try:
        yield
    except SystemExit as stop:
        code = stop.code
    except KeyboardInterrupt:
        code = 130
        say("interrupted", sys.stderr)
    except BaseException as error:
        code = report(error)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler raises where a worker is killed
    for worker in torch.multiprocessing.active_children():
        worker.kill()
    sys.stdout.flush()
    if dist.is_initialized():
        os._exit(code)
    if code:
        sys.exit(code)


def launch(train, parser, recipes, **limits):
    """train(args) with the flags of parse_args(), within orderly_exit()."""
    def refuse(message):
        raise UserError(f"{message}; see --help")

    parser.error = refuse
    with orderly_exit():
        train(parse_args(parser, recipes, limits))


# --- 4. A run -------------------------------------------------------------------------------------

def write(path, save, previous=None):
    """save(file): `path` holds the old bytes or all of the new ones, whatever happens. The old ones
    keep the name `previous`. Raises UserError."""
    part = path.with_suffix(".part")
    try:
        part.unlink(missing_ok=True)
        with open(part, "xb") as file:  # x: follows no link
            save(file)
            file.flush()
            os.fsync(file.fileno())
        if previous and path.exists():
            with contextlib.suppress(OSError):  # a file system without hard links keeps none
                path.with_name(previous).unlink(missing_ok=True)
                os.link(path, path.with_name(previous))
        os.replace(part, path)
    except (OSError, RuntimeError) as error:  # torch.save makes a RuntimeError of a full disk
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        reason = error if isinstance(error, OSError) else error.__context__
        if not isinstance(reason, OSError):
            raise  # not of writing: a data worker was killed meanwhile
        raise UserError(f"cannot write {path} ({reason}); what it held is intact") from error


def answer_signals(handler):
    for number in SIGNALS:
        signal.signal(number, handler)


def data_loader(dataset, workers, **how):
    """A DataLoader with forked workers, which share the data. A signal to the whole process group
    is the main process's to answer."""
    if workers:
        how |= dict(timeout=TIMEOUT.total_seconds(), multiprocessing_context="fork")
    how |= dict(num_workers=workers, worker_init_fn=lambda _: answer_signals(signal.SIG_IGN))
    how |= dict(pin_memory=torch.cuda.is_available())  # copies to a GPU need not be waited for
    return torch.utils.data.DataLoader(dataset, **how)


class Run:
    """A run in OUT/NAME: log.jsonl, backbone.pt, last.pt and the checkpoint before, previous.pt."""

    def __init__(self, args, model, optimizer, data, device):
        self.args = args
        self.model = model
        self.optimizer = optimizer
        self.data = data
        self.device = device
        self.rank, self.world = rank_and_world()
        self.folder = Path(args.out) / args.name
        self.step = 0
        self.signal = 0  # that came
        self.broken = 0  # images that could not be read, in this process
        self.per_epoch = len(data) // args.batch_size  # steps
        self.total = args.epochs * self.per_epoch
        self.keep_steps = args.keep_every * self.per_epoch
        if args.batch_size < 2 * self.world or args.batch_size % self.world:
            raise UserError(f"--batch-size {args.batch_size}: it must be a multiple of the "
                            f"{self.world} processes, 2 or more for each")
        if not self.per_epoch:
            raise UserError(f"--batch-size {args.batch_size} is larger than the {len(data)} images")
        open_data(args.data, "val", args.size)  # if it cannot be read, it is better to know it now

        if self.rank == 0:
            self.claim_folder()
        self.resume()
        if args.compile:
            for name, module in model.named_modules():
                if name.endswith("backbone"):
                    module.compile()  # the parameters keep their names
        if self.rank == 0:
            self.start_log()
            self.introduce()
        answer_signals(self.on_signal)
        self.first = self.logged = self.step  # since when rates are measured
        self.started = self.logged_at = self.shown_at = self.saved_at = time.monotonic()
        self.waited = 0.0  # seconds for data, since the last log line

    def claim_folder(self):
        """Makes the folder this run's alone. The kernel drops the lock when the process dies."""
        name = self.args.name
        if name in ("", ".", "..") or "/" in name or not name.isprintable():
            raise UserError(f"--name {name!r}: it must be the name of a folder, without slashes")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        except OSError as error:
            raise UserError(f"cannot write in {self.folder} ({error}); try another --out") from None
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise UserError(f"another run is at work in {self.folder}: wait for its end") from None
        except OSError as error:
            warn(f"cannot lock {self.folder} ({error}): start no second run in it")

    def newest_checkpoint(self):
        """The newest one that is whole, or None in a new folder."""
        paths = list(filter(Path.exists, [self.folder / "last.pt", self.folder / "previous.pt"]))
        for path in paths:
            try:
                return torch.load(path, map_location="cpu", weights_only=True)
            except Exception as error:  # whatever the bytes of the file make torch raise
                warn(f"cannot read {path} ({str(error)[:80]})")
        if paths:
            raise UserError(f"no whole checkpoint in {self.folder}: give another --name")
        return None

    def resume(self):
        """Goes on from the newest checkpoint, if its settings are those of now. UserError."""
        state = self.newest_checkpoint()
        if self.args.bf16 is None:
            self.args.bf16 = state["args"]["bf16"] if state else has_bf16()
        method = inspect.getfile(type(self.model))
        code = b"".join(Path(file).read_bytes() for file in (method, common.__file__, __file__))
        self.settings = vars(self.args) | {
            "images": len(self.data),
            "digest": self.data.digest(),  # another --data may be the same data
            "code": hashlib.sha256(code).hexdigest()[:12],
        }
        fixed = {key: value for key, value in self.settings.items() if key not in FREE}
        if state:
            then = state["args"]
            if then.get("code") != self.settings["code"]:
                warn("the method's file, common.py or training.py has changed since the checkpoint")
            differ = [f"{key.replace('_', '-')} {then[key]} (now {value})"
                      for key, value in fixed.items() if then.get(key, value) != value]
            if differ:
                raise UserError(f"{self.folder} has {', '.join(differ)}: give another --name")
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step = state["step"]
        if self.world > 1:
            everyone = [None] * self.world
            dist.all_gather_object(everyone, (self.step, fixed))
            if any(other != everyone[0] for other in everyone):
                raise UserError("the processes differ in their checkpoint, arguments or images")

    def start_log(self):
        """Opens log.jsonl, without steps that a crash undid; writes backbone.json, the settings."""
        path = self.folder / "log.jsonl"
        text = path.read_bytes() if path.exists() else b""
        lines = re.finditer(rb'^{"step": (\d+), .*}\n', text, re.MULTILINE)
        write(path, lambda file: file.writelines(x[0] for x in lines if int(x[1]) <= self.step))
        self.log_file = open(path, "a")
        settings = json.dumps(self.settings).encode()
        write(self.folder / "backbone.json", lambda file: file.write(settings))

    def introduce(self):
        """Says the settings, where the run stands, and what may not be as it was meant."""
        for key, value in self.settings.items():
            say(f"  {key:20} {value}")
        how = f"resumed at step {self.step}" if self.step else "a new run"
        say(f"{self.folder}: {how} of {self.total}, processes: {self.world} on {self.device.type}")
        if not self.data.classes:
            paths = [self.data.name(index) for index in range(len(self.data))]
            for folder, count in Counter(map(os.path.dirname, paths)).most_common(10):
                say(f"  {count} images in {printable(folder)}")
        if self.step == self.total:
            say("It is finished. Another --name trains anew; --init starts from its weights.")
        if self.args.warmup_epochs >= self.args.epochs:
            warn("the learning rate does not reach its peak: give fewer --warmup-epochs")

    def on_signal(self, number, frame):
        self.signal = number
        signal.signal(signal.SIGINT, signal.default_int_handler)  # the next one ends the run
        if number == signal.SIGINT:
            say("saving after this step; again to quit now")

    def batches(self, sample):
        """Yields a Batch on the device for each step left, and seeds it. sample: see Views."""
        seed = self.args.seed
        order = Batches(len(self.data), self.args.batch_size, self.step, self.total, seed,
                        self.rank, self.world)
        loader = data_loader(Views(self.data, sample, seed), self.args.workers, batch_sampler=order)
        seen = 0
        asked = time.monotonic()
        for batch in loader:
            self.waited += time.monotonic() - asked
            seen += len(batch.broken)
            self.broken += int(batch.broken.sum())
            if self.broken > 10 + 0.01 * seen:
                raise UserError(f"{self.broken} of {seen} images could not be read, over 1%: mend "
                                "or remove those that the warnings name")
            torch.manual_seed(seed_of(seed, self.step, self.rank, 1))  # 1: not the seed of a view
            views = [view.to(self.device, non_blocking=True) for view in batch.views]
            yield Batch(views, *[t.to(self.device, non_blocking=True) for t in batch[1:]])
            asked = time.monotonic()

    def set_lr(self):
        """Sets this step's learning rate and returns it."""
        peak = self.args.base_lr * self.args.batch_size / 256
        warmup = self.args.warmup_epochs * self.per_epoch
        lr = cosine_schedule(self.step, self.total, warmup, peak, self.args.final_lr)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        return lr

    def log(self, **metrics):
        """A line in log.jsonl and on the screen, every --log-every steps and at the last. metrics:
        numbers or 0-d tensors, averaged over processes. UserError where the loss is not finite."""
        step = self.step + 1
        if step % self.args.log_every and step != self.total:
            return
        metrics["broken"] = self.broken * self.world  # so that their mean is the sum
        values = [torch.as_tensor(value, device=self.device) for value in metrics.values()]
        values = torch.stack([value.detach().double() for value in values])
        if self.world > 1:
            dist.all_reduce(values)
        terms = dict(zip(metrics, (values / self.world).tolist()))
        line = dict(step=step, epoch=step / self.per_epoch, **terms)
        shown = [f"{name}={value:.4g}" for name, value in line.items() if value]
        if not math.isfinite(terms["loss"]):
            raise UserError(f"NaN or infinity ({', '.join(shown)}): {CURE}")

        now = time.monotonic()
        seconds = now - self.logged_at
        rate = (step - self.logged) / seconds  # steps a second
        line |= dict(wait=self.waited / seconds, images_per_s=rate * self.args.batch_size,
                     minutes_left=(self.total - step) / rate / 60,
                     memory_gb=torch.cuda.max_memory_allocated() / 1e9)
        self.logged = step
        self.logged_at = now
        self.waited = 0.0
        if self.rank == 0:
            try:
                print(json.dumps(line), file=self.log_file, flush=True)
            except OSError as error:  # the line stays in the buffer, to go out with a later one
                warn(f"cannot write to {self.folder / 'log.jsonl'} ({error})")
            say(textwrap.fill("  ".join(shown), 118, subsequent_indent="  "))

    def show_progress(self):
        """How far the run is: on a terminal a line that renews itself, else one every 10 s."""
        now = time.monotonic()
        terminal = sys.stdout.isatty()
        if now - self.shown_at < (0.2 if terminal else 10) and self.step > self.first + 1:
            return
        self.shown_at = now
        rate = (self.step - self.first) / (now - self.started)  # steps a second
        left = (self.total - self.step) / rate / 60
        done = 20 * self.step // self.total
        say(f"[{done * '#':20}] step {self.step} of {self.total}, "
            f"{rate * self.args.batch_size:.4g} images/s, {left:.1f} min left",
            end="" if terminal and self.step < self.total else "\n")

    def end_step(self):
        """Counts the step. Saves where it is time to, and on a signal, which then ends the run."""
        self.step += 1
        if self.rank == 0:
            self.show_progress()
        last = self.step == self.total
        kept = self.keep_steps and self.step % self.keep_steps == 0
        if self.world > 1 and self.step % VOTE_EVERY and not last and not kept:
            return
        due = last or kept or time.monotonic() - self.saved_at >= 60 * self.args.save_minutes
        votes = torch.tensor([self.signal, due])
        if self.world > 1:
            dist.all_reduce(votes, dist.ReduceOp.MAX)  # so that all save or stop at one step
        stop, due = votes.tolist()
        if stop or due:
            self.save(kept, must=stop or last)
        if stop:
            say(f"{signal.Signals(stop).name}: saved at step {self.step}; the same command resumes")
            sys.exit(0)

    def save(self, kept, must):
        """last.pt and backbone.pt, the latter also under its epoch if `kept`, where all is finite.
        A failure to write is fatal if `must`."""
        self.saved_at = time.monotonic()
        model = self.model.state_dict()
        if not all(t.isfinite().all() for t in model.values() if t.is_floating_point()):
            raise UserError(f"NaN or infinity in the weights of step {self.step}: {CURE}")
        if self.rank:
            return
        names = ["backbone.pt"]
        if kept:
            names.append(f"backbone-{self.step // self.per_epoch}.pt")
        backbone = self.model.backbone.state_dict()
        optimizer = self.optimizer.state_dict()
        state = dict(step=self.step, model=model, optimizer=optimizer, args=self.settings)
        try:
            for name in names:
                write(self.folder / name, lambda file: torch.save(backbone, file))
            write(self.folder / "last.pt", lambda file: torch.save(state, file), "previous.pt")
        except UserError as error:
            if must:
                raise
            warn(error)  # the next checkpoint may find room

    def finish(self, *protocols, figure="curves"):
        """Evaluates the backbone and draws a figure, in commands of their own: `python -m evaluate
        PROTOCOL ...`, `python visualize.py FIGURE ...`; or says how where it cannot be done."""
        answer_signals(signal.SIG_DFL)
        if self.rank:
            return
        here = Path(__file__).resolve().parent
        env = {**os.environ, "WORLD_SIZE": "1", "PYTHONPATH": str(here)}
        folder = str(self.folder)
        labels = bool(self.data.classes)
        for protocol in protocols:
            command = ["-m", "evaluate", *protocol.split(), "--checkpoint", folder, "--baseline"]
            if (here / "evaluate").is_dir() and (labels or protocol == "correspond"):
                subprocess.run([sys.executable, *command], env=env, check=False)
            else:
                why = "needs the folder evaluate/" if labels else "needs labels"
                say(f"{protocol} {why}: python {' '.join(command)}")
        script = here / "visualize.py"
        if script.exists() and importlib.util.find_spec("matplotlib"):
            picture = f"{folder}/{figure.split()[0]}.png"
            command = [str(script), *figure.split(), folder, "--out", picture]
            subprocess.run([sys.executable, *command], env=env, check=False)
        protocol = "linear" if labels else "features --out x.npy"
        say(f"{folder} holds backbone.pt (weights), last.pt (to go on), log.jsonl. Next:\n"
            f"  python -m evaluate {protocol} --checkpoint {folder}\n"
            f"  python visualize.py curves {folder}")
