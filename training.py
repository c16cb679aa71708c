"""A run's plumbing, which no paper defines: processes, optimizer, flags, checkpoints, resume, log."""
import argparse
import contextlib
import datetime
import fcntl
import hashlib
import json
import math
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from common import ARCHITECTURES, Batch, Batches, UserError, Views, seed_of

TIMEOUT = datetime.timedelta(minutes=30)  # a slow disk can keep one process that long
VOTE_EVERY = 10  # steps between the votes of several processes to save or to stop

# --- 1. Optimization ------------------------------------------------------------------------------

class LARS(torch.optim.Optimizer):
    """SGD whose step on a weight matrix is scaled to eta times the matrix's norm (arXiv:1708.03888).

    One-dimensional parameters (biases, normalization) are neither decayed nor scaled. The gradients
    are overwritten, so that a step allocates nothing.
    """

    def __init__(self, params, lr=0.0, weight_decay=0.0, momentum=0.9, eta=0.001):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum, eta=eta))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            matrices = [p for p in params if p.ndim > 1]
            if matrices:
                grads = [p.grad for p in matrices]
                torch._foreach_add_(grads, matrices, alpha=group["weight_decay"])
                w = torch.stack(torch._foreach_norm(matrices))
                g = torch.stack(torch._foreach_norm(grads))
                ratio = torch.where((w > 0) & (g > 0), group["eta"] * w / g, 1.0)
                torch._foreach_mul_(grads, ratio.unbind())
            if params:
                for p in params:
                    if p not in self.state:
                        self.state[p]["momentum"] = torch.zeros_like(p)
                momenta = [self.state[p]["momentum"] for p in params]
                torch._foreach_mul_(momenta, group["momentum"])
                torch._foreach_add_(momenta, [p.grad for p in params])
                torch._foreach_add_(params, momenta, alpha=-group["lr"])


def cosine_schedule(step, total, warmup, peak, final):
    """Linear from 0 to `peak` in `warmup` steps, then half a cosine to `final` at step `total`."""
    if step < warmup:
        return peak * step / warmup
    progress = (step - warmup) / (total - warmup)
    return final + 0.5 * (peak - final) * (1 + math.cos(math.pi * progress))


def probe(logits, labels):
    """Loss and {"accuracy"} of a linear classifier trained along, from logits (B, classes) or None.

    labels (B,) are -1 where unknown.
    """
    if logits is None:
        return 0.0, {}
    known = (labels >= 0).sum().clamp(min=1)
    loss = F.cross_entropy(logits.float(), labels, ignore_index=-1, reduction="sum") / known
    return loss, {"accuracy": (logits.argmax(1) == labels).sum() / known}


# --- 2. Processes ---------------------------------------------------------------------------------

def rank_and_world():
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def of_this_start(store, rank, world):
    """The part of torchrun's store that belongs to this start: the store outlives a restart, and
    with it the addresses of the dead.

    Each process writes a new name of its own before it reads those of all. So all can agree on the
    same list of names only when every name in it is new; its digest then names the part.
    """
    store.set(f"name {rank}", os.urandom(8).hex())
    digest = None
    while digest is None or store.add(digest, 0) < world:
        names = store.multi_get([f"name {r}" for r in range(world)])
        if hashlib.sha256(b"".join(names)).hexdigest() != digest:
            digest = hashlib.sha256(b"".join(names)).hexdigest()
            store.add(digest, 1)
        time.sleep(0.02)
    return dist.PrefixStore(digest, store)


def set_up(seed):
    """Joins torchrun's process group (NCCL or gloo; none without it) and seeds -> the device."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        store, rank, world = next(dist.rendezvous("env://", timeout=TIMEOUT))
        store = of_this_start(store, rank, world)
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world,
                                timeout=TIMEOUT)
    torch.manual_seed(seed)
    return device


def distribute(model, device):
    """The model on its device, and the same in DDP: channels_last, SyncBatchNorm on CUDA."""
    model = model.to(device, memory_format=torch.channels_last)
    if not dist.is_initialized():
        return model, model
    ids = None
    if device.type == "cuda":  # on the CPU, BatchNorm's statistics stay those of each process
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        ids = [device.index]
    return model, nn.parallel.DistributedDataParallel(model, ids, gradient_as_bucket_view=True)


# --- 3. Command line ------------------------------------------------------------------------------

def has_bf16():
    """Whether bfloat16 is fast here: on GPUs and CPUs with instructions for it."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(getattr(torch.cpu, "get_capabilities", dict)().get("avx512_bf16"))


def cores():
    """The CPU cores of this process, where a machine's processes share them."""
    here = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return here // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


LIMITS = dict(
    size=(1, 4096), epochs=(1, math.inf), batch_size=(2, math.inf), base_lr=(0, math.inf),
    final_lr=(0, math.inf), weight_decay=(0, math.inf), warmup_epochs=(0, math.inf),
    seed=(0, 2**31), workers=(0, 1024), save_minutes=(0, math.inf), log_every=(1, math.inf),
)


def parse_args(parser, recipes, limits):
    """Adds the flags of every method. A recipe gives the defaults, any flag overrides it.

    recipes: by --arch or its family (resnet, convnext, vit) if they have one, else by --data, else
    imagenet's; limits: {flag: (lowest, highest)}. Raises UserError for what is out of them.
    """
    flag = parser.add_argument
    flag("--data", default="shapes",
         help="shapes, cifar10, cifar100, stl10, voc, or a folder of images (or one in $DATA)")
    flag("--arch", help=", ".join(ARCHITECTURES))
    flag("--size", type=int, help="side of a view in pixels")
    flag("--epochs", type=int, help="passes over the data")
    flag("--batch-size", type=int, help="images of a step, of all processes together")
    flag("--base-lr", type=float, help="the peak learning rate is base-lr * batch-size / 256")
    flag("--final-lr", type=float, help="learning rate of the last step")
    flag("--weight-decay", type=float, help="of weight matrices")
    flag("--warmup-epochs", type=int, help="epochs in which the learning rate rises to its peak")
    flag("--seed", type=int, default=0, help="of all that is random")
    flag("--bf16", action=argparse.BooleanOptionalAction, default=has_bf16(),
         help="autocast to bfloat16; by default where it is fast")
    flag("--workers", type=int, default=min(12, cores()), help="data loading processes of each")
    flag("--out", default="runs", help="folder of all runs")
    flag("--name", help="this run's folder in --out; by default METHOD-DATA")
    flag("--save-minutes", type=float, default=10, help="minutes between checkpoints")
    flag("--log-every", type=int, default=50, help="steps between log lines")
    known, _ = parser.parse_known_args()
    data = Path(known.data).name
    family = (known.arch or "").split("_")[0]
    recipe = recipes.get(data, recipes["imagenet"])
    recipe = recipes.get(known.arch, recipes.get(family, recipe))
    parser.set_defaults(**recipe, name=f"{Path(sys.argv[0]).stem}-{data}")

    args = parser.parse_args()
    for name, (low, high) in {**LIMITS, **limits}.items():
        if not low <= getattr(args, name) <= high:
            said = f"--{name.replace('_', '-')} {getattr(args, name)}"
            raise UserError(f"{said}: it must be {low} or more and at most {high}")
    return args


def printable(text):
    """The same on one line: control characters and bytes that are no text are escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


@contextlib.contextmanager
def one_line_errors():
    """Around a main(): a UserError becomes one line on stderr, and exit code 2.

    Every way out kills the data workers first, for which Python would wait. Where there are several
    processes, one that fails leaves at once, and torchrun ends the others.
    """
    code = 0
    try:
        yield
    except UserError as error:
        code = 2
        line = str(error).rpartition("UserError: ")[2].strip()  # a worker puts its traceback before
        if line:
            print(f"error: {printable(line)}", file=sys.stderr)
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        code = 1
        traceback.print_exc()
    for worker in multiprocessing.active_children():
        worker.kill()
    sys.stdout.flush()
    sys.stderr.flush()
    if dist.is_initialized():
        if code:
            os._exit(code)
        dist.destroy_process_group()
    if code:
        sys.exit(code)


def launch(train, parser, recipes, **limits):
    """train(args), args being the method's flags and those of parse_args(); limits as there."""

    def refuse(message):
        raise UserError(f"{message}; see --help")

    parser.error = refuse
    with one_line_errors():
        train(parse_args(parser, recipes, limits))


# --- 4. A run -------------------------------------------------------------------------------------

def write(path, save, previous=None):
    """save(file), so that `path` holds the old file or all of the new one, whatever happens.

    previous: a second name, which the old file keeps. Raises UserError, with nothing lost.
    """
    part = path.with_suffix(".part")
    try:
        part.unlink(missing_ok=True)
        with open(part, "xb") as file:  # x: follows no link that somebody put there
            save(file)
            file.flush()
            os.fsync(file.fileno())
        if previous and path.exists():
            with contextlib.suppress(OSError):  # a file system without hard links keeps none
                previous.unlink(missing_ok=True)
                os.link(path, previous)
        os.replace(part, path)
    except (OSError, RuntimeError) as error:
        reason = error if isinstance(error, OSError) else error.__context__
        if not isinstance(reason, OSError):  # torch.save makes a RuntimeError of a failure to write
            raise
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        kept = "what it held before is intact"
        raise UserError(f"cannot write {path} ({reason}); {kept}: free space, run again") from error


def warn(message):
    print("warning:", printable(str(message)), file=sys.stderr, flush=True)


def millions(module):
    return f"{sum(p.numel() for p in module.parameters()) / 1e6:.2f}M"


def ignore_signals(_):
    """In data workers: a signal to the whole process group is the main process's to answer."""
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


class Run:
    """A training run in the folder OUT/NAME: log.jsonl, last.pt, backbone.pt.

    It resumes from last.pt, or where that cannot be read from previous.pt, the checkpoint before.
    """

    FREE = {"out", "name", "workers", "save_minutes", "log_every"}  # may change on resuming

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
        self.broken = torch.zeros(2)  # images that could not be read, and images seen, since the start
        self.per_epoch = len(data) // args.batch_size
        self.total = args.epochs * self.per_epoch
        self.peak_lr = args.base_lr * args.batch_size / 256

        if args.batch_size < 2 * self.world or args.batch_size % self.world:
            raise UserError(f"--batch-size {args.batch_size}: it must be a multiple of the "
                            f"{self.world} processes, with 2 images or more for each")
        if not self.per_epoch:
            raise UserError(f"--batch-size {args.batch_size} is larger than the {len(data)} images "
                            f"of {args.data}")
        if self.rank == 0:
            self.claim()
        self.resume()
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self.on_signal)
        if self.rank == 0:
            self.open_log()
            self.describe()
        self.saved = time.monotonic()

    def claim(self):
        """Makes the folder this run's alone."""
        name = self.args.name
        if name in ("", ".", "..") or "/" in name or not name.isprintable():
            raise UserError(f"--name {name!r} is no name of a folder in --out: "
                            "take one without slashes and control characters")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        except OSError as error:
            raise UserError(f"cannot write in {self.folder} ({error}): give another --out") from error
        self.lock = os.fdopen(lock, "r+")  # the kernel unlocks it when the process dies
        try:
            fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise UserError(f"another run is at work in {self.folder}: wait for its end, or give "
                            "another --name") from None
        except OSError as error:
            warn(f"cannot lock {self.folder} ({error}): start no second run in it")

    def last_checkpoint(self):
        """What last.pt holds, or else previous.pt; None where there is neither."""
        problems = []
        for path in (self.folder / "last.pt", self.folder / "previous.pt"):
            if not path.exists():
                continue
            try:
                state = torch.load(path, map_location="cpu", weights_only=True)
                if problems:
                    warn(f"{problems[0]}: {path}, the checkpoint before it, takes its place")
                return state
            except Exception as error:  # whatever the bytes of the file make the unpickler raise
                problems.append(f"{path} cannot be read ({str(error).splitlines()[0][:100]})")
        if problems:
            raise UserError(f"{problems[0]}, and no previous.pt: give another --name")
        return None

    def resume(self):
        state = self.last_checkpoint()
        now = {**vars(self.args), "images": len(self.data)}
        if state is not None:
            then = state["args"]
            changed = [f"{key.replace('_', '-')} {then[key]} (now {value})"
                       for key, value in now.items()
                       if key in then.keys() - self.FREE and value != then[key]]
            if changed:
                raise UserError(f"{self.folder} was started with {', '.join(changed)}: give the "
                                "same, or another --name")
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step = state["step"]
        if self.world > 1:
            seen = torch.tensor([self.step, -self.step, len(self.data), -len(self.data)])
            dist.all_reduce(seen, dist.ReduceOp.MAX, group=self.control)
            if seen[0] != -seen[1] or seen[2] != -seen[3]:
                self.fail("the processes see different checkpoints or images: --out and --data "
                          "must be shared by all")

    def open_log(self):
        """Opens log.jsonl without the lines beyond this step, which a crash can leave."""
        path = self.folder / "log.jsonl"
        kept = []
        for line in path.read_bytes().splitlines(keepends=True) if path.exists() else []:
            with contextlib.suppress(ValueError, TypeError, KeyError):  # any bytes, after a crash
                if line.endswith(b"\n") and json.loads(line)["step"] <= self.step:
                    kept.append(line)
        write(path, lambda file: file.write(b"".join(kept)))
        self.log_file = open(path, "a")

    def describe(self):
        """Prints the settings in force."""
        rows = dict(sorted(vars(self.args).items()))
        rows["peak lr"] = f"{self.peak_lr:g}"
        rows["images"] = f"{len(self.data)}, {self.per_epoch} steps an epoch, {self.total} in all"
        each = self.args.batch_size // self.world
        rows["processes"] = f"{self.world} on {self.device.type}, {each} images each"
        rows["parameters"] = f"{millions(self.model.backbone)} backbone, {millions(self.model)} in all"
        for key, value in rows.items():
            print(f"  {key.replace('_', '-'):16} {value}")
        start = f"resumed at step {self.step}" if self.step else "a new run"
        print(f"{self.folder}: {start}", flush=True)

    def on_signal(self, number, frame):
        self.signal = number
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if number == signal.SIGINT:
            print("stopping after this step, to save; again to quit now", flush=True)

    def batches(self, sample):
        """Yields a Batch on the device for each step that is left, and seeds the step's randomness.

        sample: as in common.Views.
        """
        args, cuda = self.args, self.device.type == "cuda"
        order = Batches(len(self.data), args.batch_size, self.step, self.total, args.seed, self.rank,
                        self.world)
        loader = torch.utils.data.DataLoader(
            Views(self.data, sample, args.seed),
            batch_sampler=order,
            num_workers=args.workers,
            pin_memory=cuda,
            timeout=TIMEOUT.total_seconds() if args.workers else 0,
            worker_init_fn=ignore_signals,
            multiprocessing_context="fork" if args.workers else None,  # they share the data
        )
        self.reset_clock()
        try:
            asked = time.monotonic()
            for batch in loader:
                self.waited += time.monotonic() - asked
                self.broken += torch.tensor([batch.broken.sum(), len(batch.broken)])
                torch.manual_seed(seed_of(args.seed, self.step, self.rank, 1))
                views, *rest = batch
                views = [view.to(self.device, non_blocking=True) for view in views]
                yield Batch(views, *(t.to(self.device, non_blocking=True) for t in rest))
                asked = time.monotonic()
        except RuntimeError as error:
            if "DataLoader" not in str(error):
                raise
            cure = "more memory, docker's --shm-size, `ulimit -n` or fewer --workers may help"
            raise UserError(f"a data worker died or hung ({error}): {cure}") from error

    def set_lr(self):
        """Sets this step's learning rate and returns it."""
        warmup = self.args.warmup_epochs * self.per_epoch
        lr = cosine_schedule(self.step, self.total, warmup, self.peak_lr, self.args.final_lr)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        return lr

    def reset_clock(self):
        self.waited = 0.0
        self.clock = time.monotonic()
        self.clock_step = self.step

    def fail(self, why):
        """For what all processes find out together: the first one says it."""
        raise UserError(why if self.rank == 0 else "")

    def log(self, **metrics):
        """Every --log-every steps and at the last: a line in log.jsonl and one for the eye.

        metrics: numbers or 0-d tensors, averaged over processes. Raises UserError, with every term,
        where the loss is not finite, and where over 1% of the images cannot be read.
        """
        self.metrics = metrics
        step = self.step + 1
        if step % self.args.log_every and step != self.total:
            return
        values = [torch.as_tensor(v, dtype=torch.float64, device=self.device) for v in metrics.values()]
        values = torch.stack(values).detach()
        if self.world > 1:
            dist.all_reduce(values)
        line = dict(zip(metrics, (values / self.world).tolist()))
        if not math.isfinite(line["loss"]):
            self.diverged(line)
        broken = self.check_broken()
        if self.rank == 0:
            self.write_line(step, line, broken)
        self.reset_clock()

    def write_line(self, step, metrics, broken):
        seconds = time.monotonic() - self.clock
        rate = (step - self.clock_step) / seconds
        eta = (self.total - step) / rate
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        if self.device.type == "cuda":
            memory = torch.cuda.max_memory_allocated()
        line = dict(step=step, epoch=step / self.per_epoch, **metrics, broken=broken, eta_s=eta,
                    images_per_s=rate * self.args.batch_size, data_wait=self.waited / seconds,
                    memory_gb=memory / 1e9)
        try:
            self.log_file.write(json.dumps(line) + "\n")
            self.log_file.flush()
        except OSError as error:  # the line stays in the buffer, to go out with a later one
            warn(f"cannot write to {self.folder / 'log.jsonl'} ({error})")
        shown = [f"epoch {line['epoch']:.2f}/{self.args.epochs}"]
        shown += [f"{name} {value:.4g}" for name, value in metrics.items()]
        shown += [f"{line['images_per_s']:.0f} img/s", f"wait {line['data_wait']:.0%}",
                  f"{line['memory_gb']:.1f} GB", f"eta {datetime.timedelta(seconds=round(eta))}"]
        if broken:
            shown.append(f"broken {broken}")
        print(*shown, sep="  ", flush=True)

    def check_broken(self):
        """How many images of all processes could not be read since the start."""
        total = self.broken.clone()
        if self.world > 1:
            dist.all_reduce(total, group=self.control)
        broken, seen = total.int().tolist()
        if broken > 10 + 0.01 * seen:
            self.fail(f"{broken} of {seen} images could not be read, over 1%: see the warnings, "
                      "mend or remove these files")
        return broken

    def diverged(self, terms):
        said = ", ".join(f"{name} {float(value):g}" for name, value in terms.items())
        cure = "try a lower --base-lr or --no-bf16, under another --name"
        self.fail(f"NaN or infinity by step {self.step + 1} ({said}), not saved: {cure}")

    def end_step(self):
        """Counts the step. Saves where it is time to; on a signal too, and then ends the run."""
        self.step += 1
        last = self.step == self.total
        wish = self.signal or int(time.monotonic() - self.saved >= 60 * self.args.save_minutes)
        if self.world > 1:
            if self.step % VOTE_EVERY and not last:
                return
            vote = torch.tensor(wish)  # all save and stop at one step, though their clocks differ
            dist.all_reduce(vote, dist.ReduceOp.MAX, group=self.control)
            wish = int(vote)
        if wish or last:
            self.save(must=wish > 1 or last)
            self.saved = time.monotonic()
        if wish > 1:
            if self.rank == 0:
                name = signal.Signals(wish).name
                print(f"{name}: saved at step {self.step}; the same command resumes", flush=True)
            sys.exit(0)

    def save(self, must):
        """last.pt and backbone.pt, if all is finite. A failure to write is fatal if it `must` work.

        All processes call it, to find out together what is not finite; the first one writes.
        """
        tensors = [t for t in self.model.state_dict().values() if t.is_floating_point()]
        if not all(t.isfinite().all() for t in tensors):
            self.diverged(self.metrics)
        self.check_broken()
        if self.rank:
            return
        state = dict(model=self.model.state_dict(), optimizer=self.optimizer.state_dict(),
                     step=self.step, args={**vars(self.args), "images": len(self.data)})
        backbone = self.model.backbone.state_dict()
        try:
            write(self.folder / "backbone.pt", lambda file: torch.save(backbone, file))
            previous = self.folder / "previous.pt"
            write(self.folder / "last.pt", lambda file: torch.save(state, file), previous)
        except UserError as error:
            if must:
                raise
            warn(error)  # the next checkpoint may find room

    def finish(self, *protocols):
        """Evaluates the trained backbone beside an untrained one, by `python -m evaluate`.

        The first process does it, where evaluate/ lies beside this file and the data has labels;
        else it says how.
        """
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if self.rank:
            return
        here = Path(__file__).resolve().parent
        for protocol in protocols:
            command = ["-m", "evaluate", protocol, "--checkpoint", str(self.folder), "--baseline"]
            if (here / "evaluate").is_dir() and self.data.classes:
                env = {**os.environ, "WORLD_SIZE": "1", "PYTHONPATH": str(here)}
                subprocess.run([sys.executable, *command], env=env, check=False)
            else:
                print("to evaluate it: python", " ".join(command))
