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
            group.update(decay=weight_decay, eta=eta)

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


def of_this_start(store, rank, world):
    """torchrun's store for this start alone, without what an earlier start left in it. Each process
    puts a new name into a list, then reads the list: all agree only on a new list."""
    store.set(f"name {rank}", os.urandom(4).hex())
    agreed = ""
    while not agreed or store.add(agreed, 0) < world:
        names = b"".join(store.multi_get([f"name {r}" for r in range(world)])).decode()
        if names != agreed:
            agreed = names
            store.add(agreed, 1)
        time.sleep(0.02)
    return dist.PrefixStore(agreed, store)


def set_up(seed):
    """Joins torchrun's process group (NCCL or gloo; none without it), seeds -> the device."""
    torch.manual_seed(seed)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        store, rank, world = next(dist.rendezvous("env://", timeout=TIMEOUT))
        store = of_this_start(store, rank, world)
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=TIMEOUT)
    return device


def distribute(model, device):
    """The model on its device, channels_last, and the same in DDP, BatchNorm over all processes."""
    model = model.to(device, memory_format=torch.channels_last)
    if not dist.is_initialized():
        return model, model
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.__class__ = GlobalBatchNorm  # the parameters keep their names
    ddp = torch.nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    ddp.broadcast_buffers = False  # they stay equal by themselves
    return model, ddp


class GlobalBatchNorm(torch.nn.modules.batchnorm._BatchNorm):
    """BatchNorm over the batches of all processes, which must be of one size. As torch's
    SyncBatchNorm, but also on the CPU, and without its host syncs."""

    @torch.compiler.disable  # --compile leaves the collectives out
    def forward(self, x):
        if not self.training:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias)
        self.num_batches_tracked.add_(1)
        if x.is_cuda:
            return BatchNormOnCUDA.apply(x, self.weight, self.bias, self)

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


@functools.cache
def filled(size, number, dtype, device):
    return torch.full((size,), number, dtype=dtype, device=device)


class BatchNormOnCUDA(torch.autograd.Function):
    """GlobalBatchNorm by torch's fused kernels: a tenth of the launches."""

    @staticmethod
    def forward(ctx, x, weight, bias, norm):
        world = dist.get_world_size()
        local = torch.cat(torch.batch_norm_stats(x, norm.eps))  # (2C,): mean, 1 / deviation
        every = local.new_empty(world * len(local))
        dist.all_gather_into_tensor(every, local)
        means, scales = every.view(world, 2, -1).unbind(1)  # (G, C) each
        number = x.numel() // x.shape[1]  # of values, in each process
        mean, scale = torch.batch_norm_gather_stats_with_counts(
            x, means, scales, norm.running_mean, norm.running_var, norm.momentum, norm.eps,
            filled(world, number, local.dtype, x.device))
        ctx.save_for_backward(x, weight, mean, scale, filled(world, number, torch.int32, x.device))
        return torch.batch_norm_elemt(x, weight, bias, mean, scale, norm.eps)

    @staticmethod
    def backward(ctx, grad):
        x, weight, mean, scale, counts = ctx.saved_tensors
        total, total_x, grad_weight, grad_bias = torch.batch_norm_backward_reduce(
            grad, x, mean, scale, weight, True, True, True)
        totals = torch.cat([total, total_x])
        dist.all_reduce(totals)
        grad_x = torch.batch_norm_backward_elemt(
            grad, x, mean, scale, weight, *totals.chunk(2), counts)
        return grad_x, grad_weight, grad_bias, None


# --- 3. Command line ------------------------------------------------------------------------------

def has_bf16():
    """Whether bfloat16 is fast here: on GPUs and CPUs with instructions for it."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(getattr(torch.cpu, "get_capabilities", dict)().get("avx512_bf16"))


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
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cores = cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
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
    flag("--workers", type=int, default=min(12, cores), help="data loading processes")
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
    for name, value in vars(args).items():
        low, high = limits.get(name, (0, math.inf))
        values = value if isinstance(value, list) else [value]
        if any(isinstance(v, int | float) and not low <= v <= high for v in values):
            name = name.replace("_", "-")
            raise UserError(f"--{name} {value}: it must be at least {low} and at most {high}")
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


@contextlib.contextmanager
def one_line_errors():
    """Around a main(): a UserError becomes one line on stderr, and exit code 2. Kills data workers,
    which Python would wait for, and leaves several processes at once: torchrun ends the others."""
    code = 0
    try:
        yield
    except SystemExit as stop:
        code = stop.code
    except KeyboardInterrupt:
        code = 130
        say("interrupted", sys.stderr)
    except BaseException as error:
        line = str(error).rpartition("UserError: ")[2].strip()  # after a data worker's traceback
        both = f"{error} {error.__context__}"  # torch raises it in whatever this process is at
        lost = re.search(r"DataLoader (worker \(pid|timed out).*", both)
        if lost:
            line = f"a data worker died or hung ({lost[0]}); try docker's --shm-size or --workers"
        code = 2 if lost or isinstance(error, UserError) else 1
        if os.environ.get("RANK", "0") != "0":
            time.sleep(2)  # what all processes meet, the first one says: then torchrun ends all
        if code == 1:
            traceback.print_exc()
        else:
            say(f"error: {printable(line)}", sys.stderr)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler raises where a worker is killed
    for worker in torch.multiprocessing.active_children():
        worker.kill()
    sys.stdout.flush()
    if dist.is_initialized():
        os._exit(code)
    if code:
        sys.exit(code)


def launch(train, parser, recipes, **limits):
    """train(args) with the flags of parse_args(), within one_line_errors()."""
    def refuse(message):
        raise UserError(f"{message}; see --help")

    parser.error = refuse
    with one_line_errors():
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


def ignore_signals(_):
    """In data workers: a signal to the whole process group is the main process's to answer."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def data_loader(dataset, workers, **how):
    """A DataLoader with forked workers, which share the data."""
    if workers:
        how |= dict(timeout=TIMEOUT.total_seconds(), multiprocessing_context="fork")
    how |= dict(num_workers=workers, worker_init_fn=ignore_signals)
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
        self.control = dist.new_group(backend="gloo", timeout=TIMEOUT) if self.world > 1 else None
        self.folder = Path(args.out) / args.name
        self.step = 0
        self.signal = 0
        self.broken = 0  # images that could not be read, in this process
        self.per_epoch = len(data) // args.batch_size  # steps
        self.total = args.epochs * self.per_epoch
        if args.batch_size < 2 * self.world or args.batch_size % self.world:
            share = f"a multiple of the {self.world} processes, 2 or more for each"
            raise UserError(f"--batch-size {args.batch_size}: it must be {share}")
        if not self.per_epoch:
            raise UserError(f"--batch-size {args.batch_size} is larger than the {len(data)} images")
        open_data(args.data, "val", args.size)  # if it cannot be read, it is better to know it now

        if self.rank == 0:
            self.claim()
        self.resume()
        if args.compile:
            for name, module in model.named_modules():
                if name.endswith("backbone"):
                    module.compile()  # the parameters keep their names
        if self.rank == 0:
            self.start_log()
        for number in SIGNALS:
            signal.signal(number, self.on_signal)
        self.started_at = self.step
        self.started = self.shown = self.saved = time.monotonic()
        self.start_clock()

    def claim(self):
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

    def resume(self):
        state = None
        paths = list(filter(Path.exists, [self.folder / "last.pt", self.folder / "previous.pt"]))
        for path in paths:
            try:
                state = torch.load(path, map_location="cpu", weights_only=True)
                break
            except Exception as error:  # whatever the bytes of the file make torch raise
                warn(f"cannot read {path} ({str(error)[:80]})")
        if paths and state is None:
            raise UserError(f"no whole checkpoint in {self.folder}: give another --name")

        if self.args.bf16 is None:
            self.args.bf16 = state["args"]["bf16"] if state else has_bf16()
        code = b"".join(Path(file).read_bytes()
                        for file in (inspect.getfile(type(self.model)), common.__file__, __file__))
        self.settings = {**vars(self.args), "images": len(self.data),
                         "classes": len(self.data.classes),
                         "digest": self.data.digest(),  # another --data may be the same data
                         "code": hashlib.sha256(code).hexdigest()[:12]}
        now = {key: value for key, value in self.settings.items() if key not in FREE}
        if state is not None:
            then = state["args"]
            if then.get("code") != self.settings["code"]:
                warn("the method's file, common.py or training.py has changed since the checkpoint")
            differ = [f"{key.replace('_', '-')} {then[key]} (now {value})"
                      for key, value in now.items() if then.get(key, value) != value]
            if differ:
                raise UserError(f"{self.folder} has {', '.join(differ)}: give another --name")
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step = state["step"]
        if self.world > 1:
            seen = [None] * self.world
            dist.all_gather_object(seen, (self.step, now), group=self.control)
            if any(other != seen[0] for other in seen):
                raise UserError("the processes differ in their checkpoint, arguments or images")

    def start_log(self):
        """Opens log.jsonl without the lines of steps that a crash undid; prints the settings."""
        path = self.folder / "log.jsonl"
        text = path.read_bytes() if path.exists() else b""
        lines = re.finditer(rb'^{"step": (\d+), .*}\n', text, re.MULTILINE)
        write(path, lambda file: file.writelines(x[0] for x in lines if int(x[1]) <= self.step))
        self.log_file = open(path, "a")
        about = {key: self.settings[key] for key in ("arch", "size", "data", "bf16")}
        about = json.dumps(about).encode()  # what backbone.pt does not say of itself
        write(self.folder / "backbone.json", lambda file: file.write(about))

        for key, value in self.settings.items():
            say(f"  {key:20} {value}")
        start = f"resumed at step {self.step}" if self.step else "a new run"
        where = f"processes: {self.world} on {self.device.type}"
        say(f"{self.folder}: {start} of {self.total}, {where}")
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
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if number == signal.SIGINT:
            say("saving after this step; again to quit now")

    def batches(self, sample):
        """Yields a Batch on the device for each step left, and seeds it. sample: see Views."""
        seed, size = self.args.seed, self.args.batch_size
        order = Batches(len(self.data), size, self.step, self.total, seed, self.rank, self.world)
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
            torch.manual_seed(seed_of(seed, self.step, self.rank, 1))
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

    def start_clock(self):
        self.waited = 0.0  # seconds for data since then
        self.clock = time.monotonic()
        self.timed = 0  # steps since then

    def log(self, **metrics):
        """A line in log.jsonl and on the screen, every --log-every steps and at the last. metrics:
        numbers or 0-d tensors, averaged over processes. UserError where the loss is not finite."""
        step = self.step + 1
        self.timed += 1
        if step % self.args.log_every and step != self.total:
            return
        metrics["broken"] = self.broken * self.world  # so that their mean is the sum
        values = [torch.as_tensor(value, device=self.device) for value in metrics.values()]
        values = torch.stack([value.detach().double() for value in values])
        if self.world > 1:
            dist.all_reduce(values)
        terms = dict(zip(metrics, (values / self.world).tolist()))
        seconds = time.monotonic() - self.clock
        rate = self.timed / seconds  # steps a second
        line = dict(step=step, epoch=step / self.per_epoch, **terms)
        shown = [f"{name}={value:.4g}" for name, value in line.items() if value]
        line |= dict(wait=self.waited / seconds, images_per_s=rate * self.args.batch_size,
                     minutes_left=(self.total - step) / rate / 60,
                     memory_gb=torch.cuda.max_memory_allocated() / 1e9)
        self.start_clock()
        if not math.isfinite(terms["loss"]):
            raise UserError(f"NaN or infinity ({', '.join(shown)}): {CURE}")

        if self.rank == 0:
            try:
                self.log_file.write(json.dumps(line) + "\n")
                self.log_file.flush()
            except OSError as error:  # the line stays in the buffer, to go out with a later one
                warn(f"cannot write to {self.folder / 'log.jsonl'} ({error})")
            say(textwrap.fill("  ".join(shown), 118, subsequent_indent="  "))

    def show_progress(self):
        """How far the run is: on a terminal a line that renews itself, else one every 10 s."""
        now = time.monotonic()
        terminal = sys.stdout.isatty()
        if now - self.shown < (0.2 if terminal else 10) and self.step > self.started_at + 1:
            return
        self.shown = now
        rate = (self.step - self.started_at) / (now - self.started)  # steps a second
        left = (self.total - self.step) / rate / 60
        done = 20 * self.step // self.total
        say(f"[{done * '#':20}] step {self.step} of {self.total}, "
            f"{rate * self.args.batch_size:.4g} images/s, {left:.1f} min left",
            end="" if terminal and self.step < self.total else "\n")

    def end_step(self):
        """Counts the step. Saves where it is time to, and on a signal, which then ends the run."""
        self.step += 1
        last = self.step == self.total
        if self.rank == 0:
            self.show_progress()
            self.keep()
        wish = self.signal or int(time.monotonic() - self.saved >= 60 * self.args.save_minutes)
        if self.world > 1:
            if self.step % VOTE_EVERY and not last:
                return
            vote = torch.tensor(wish)  # so that all save or stop at one step
            dist.all_reduce(vote, dist.ReduceOp.MAX, group=self.control)
            wish = int(vote)
        if wish or last:
            self.save(must=wish > 1 or last)
        if wish > 1:
            name = signal.Signals(wish).name
            say(f"{name}: saved at step {self.step}; the same command resumes")
            sys.exit(0)

    def keep(self):
        """backbone-EPOCH.pt, every --keep-every epochs."""
        epoch, rest = divmod(self.step, self.per_epoch)
        if self.args.keep_every and not rest and epoch % self.args.keep_every == 0:
            try:
                write(self.folder / f"backbone-{epoch}.pt", self.write_backbone)
            except UserError as error:
                warn(error)  # as of a checkpoint: a full disk does not end the run

    def write_backbone(self, file):
        torch.save(self.model.backbone.state_dict(), file)

    def save(self, must):
        """last.pt and backbone.pt, if all is finite. A failure to write is fatal if `must`."""
        self.saved = time.monotonic()
        model = self.model.state_dict()
        if not all(t.isfinite().all() for t in model.values() if t.is_floating_point()):
            raise UserError(f"NaN or infinity in the weights of step {self.step}: {CURE}")
        if self.rank:
            return
        optimizer = self.optimizer.state_dict()
        state = dict(step=self.step, model=model, optimizer=optimizer, args=self.settings)
        try:
            write(self.folder / "backbone.pt", self.write_backbone)
            write(self.folder / "last.pt", lambda file: torch.save(state, file), "previous.pt")
        except UserError as error:
            if must:
                raise
            warn(error)  # the next checkpoint may find room

    def finish(self, *protocols, figure="curves"):
        """Evaluates the backbone and draws a figure, in commands of their own: `python -m evaluate
        PROTOCOL ...`, `python visualize.py FIGURE ...`; or says how where it cannot be done."""
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        if self.rank:
            return
        here = Path(__file__).resolve().parent
        env = {**os.environ, "WORLD_SIZE": "1", "PYTHONPATH": str(here)}
        folder = str(self.folder)
        for protocol in protocols:
            command = ["-m", "evaluate", *protocol.split(), "--checkpoint", folder, "--baseline"]
            if (here / "evaluate").is_dir() and (self.data.classes or protocol == "correspond"):
                subprocess.run([sys.executable, *command], env=env, check=False)
            else:
                why = "needs the folder evaluate/" if self.data.classes else "needs labels"
                say(f"{protocol} {why}: python {' '.join(command)}")
        script = here / "visualize.py"
        if script.exists() and importlib.util.find_spec("matplotlib"):
            picture = self.folder / f"{figure.split()[0]}.png"
            command = [str(script), *figure.split(), folder, "--out", str(picture)]
            subprocess.run([sys.executable, *command], env=env, check=False)
        protocol = "linear" if self.data.classes else "features --out x.npy"
        say(f"{folder} holds backbone.pt (weights), last.pt (to go on), log.jsonl. Next:\n"
            f"  python -m evaluate {protocol} --checkpoint {folder}\n"
            f"  python visualize.py curves {folder}")
