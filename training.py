"""What the five methods share and no paper defines: backbones, data, optimisation, and a run's plumbing.

    Legend of all files: B batch, V views, H W map height and width, N = H*W locations, D width.
"""
import argparse
import contextlib
import datetime
import fcntl
import hashlib
import json
import math
import multiprocessing
import os
import random
import re
import resource
import signal
import sys
import time
import zipfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from common import ARCHITECTURES, Batch, Batches, UserError, Views, printable, read_checkpoint

# --- 3. Optimisation -----------------------------------------------------------------------------------------------


class LARS(torch.optim.Optimizer):
    """SGD whose step on each weight matrix is scaled to eta times the matrix's norm (You et al., arXiv 1708.03888).

    One-dimensional parameters (biases, normalisation) are neither decayed nor scaled. A step overwrites the gradients of
    the others, instead of allocating as much again.
    """

    def __init__(self, params, lr=0.0, weight_decay=0.0, momentum=0.9, eta=0.001):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum, eta=eta))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            live = [p for p in group["params"] if p.grad is not None]
            together = [p for p in live if p.ndim > 1], [p for p in live if p.ndim < 2]  # on a GPU: few launches
            alone = [[p] for p in live]  # on a CPU: a parameter stays in the cache from one line to the next
            for params in together if live and live[0].is_cuda else alone:
                if not params:
                    continue
                updates = [p.grad for p in params]
                if params[0].ndim > 1:
                    torch._foreach_add_(updates, params, alpha=group["weight_decay"])
                    w, u = (torch.stack(torch._foreach_norm(t)) for t in (params, updates))
                    ratio = torch.where((w > 0) & (u > 0), group["eta"] * w / u, 1.0)
                    torch._foreach_mul_(updates, ratio.unbind())
                for p in params:
                    if not self.state[p]:
                        self.state[p]["momentum"] = torch.zeros_like(p)
                momenta = [self.state[p]["momentum"] for p in params]
                torch._foreach_mul_(momenta, group["momentum"])
                torch._foreach_add_(momenta, updates)
                torch._foreach_add_(params, momenta, alpha=-group["lr"])


def cosine_schedule(step, total, warmup, peak, final):
    """Linear from 0 to `peak` over the first `warmup` steps, then half a cosine to `final` at step `total`."""
    if step < warmup:
        return peak * step / warmup
    return final + 0.5 * (peak - final) * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


def probe(logits, labels):
    """Loss and accuracy of the online linear classifier; labels (B,) are -1 where unknown, logits None without labels."""
    if logits is None:
        return 0.0, {}
    known = (labels >= 0).sum().clamp(min=1)
    loss = F.cross_entropy(logits.float(), labels, ignore_index=-1, reduction="sum") / known
    return loss, {"accuracy": (logits.argmax(1) == labels).sum() / known}


# --- 4. Run --------------------------------------------------------------------------------------------------------


TIMEOUT = datetime.timedelta(minutes=30)  # listing the images of a slow disk takes one process longer than another
GONE = {  # how torch says that another process is gone: what to say
    r"DataLoader worker \(.*(killed|exited)": "a data loading process was killed: lower --workers if memory is short",
    r"Connection (closed|reset) by peer|Broken pipe|remote process exited":
        "another process of this run has ended: see what it said",
    r"Timed out waiting|Application timeout": f"another process of this run has not answered for {TIMEOUT} h",
}


@contextlib.contextmanager
def one_line_errors():
    """Around a main(): a UserError, or the loss of another process, becomes one line on stderr and exit code 2."""
    try:
        yield
    except (UserError, RuntimeError) as error:
        line = str(error).rpartition("common.UserError: ")[2].strip()  # a loader's worker puts its traceback before it
        if not isinstance(error, UserError):
            line = next((f"{said}; the same command resumes" for seen, said in GONE.items() if re.search(seen, line)), None)
            if line is None:
                raise
        if line and first_to_say(line):
            print(f"error: {printable(line)}", file=sys.stderr, flush=True)
        if dist.is_initialized():  # others may yet ask the store who says it; a thread of gloo needs Python's lock to end,
            time.sleep(1)  # and torch 2.11 would wait for it with the lock
        if not isinstance(error, UserError):  # an orderly end would wait for a dead process, or for a lock it died with
            left = multiprocessing.active_children()
            signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # whose handler, torch's, would raise the error anew
            for worker in left:
                worker.kill()
            os._exit(2)
        sys.exit(2)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def first_to_say(line):
    """Whether no other process has said it yet, as far as one can know."""
    if dist.is_initialized():
        with contextlib.suppress(RuntimeError):  # the store may have gone with the process that held it
            return dist.distributed_c10d._get_default_store().add(line, 1) == 1
    return True


def parse_args(parser, recipes):
    """Adds the flags of every method; a recipe gives the defaults, any flag overrides it.

    recipes: by the family of --arch (resnet, convnext, vit) if it has one, else by --data, else imagenet's.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cores //= int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    flag = parser.add_argument
    flag("--data", default="shapes", help="shapes, cifar10, cifar100, stl10, voc, or a folder of images (or one in $DATA)")
    flag("--arch", help=", ".join(ARCHITECTURES))
    flag("--size", type=int, help="pixels of a view")
    flag("--epochs", type=int)
    flag("--batch-size", type=int, help="over all processes")
    flag("--base-lr", type=float, help="the peak is base-lr * batch-size / 256")
    flag("--final-lr", type=float)
    flag("--weight-decay", type=float)
    flag("--warmup-epochs", type=int)
    flag("--seed", type=int, default=0)
    flag("--bf16", action=argparse.BooleanOptionalAction, default=has_bf16(), help="autocast; default: where it is fast")
    flag("--workers", type=int, default=min(12, cores), help="data loading processes of each training process")
    flag("--out", default="runs", help="folder of all runs")
    flag("--name", help="this run's folder in --out; by default METHOD-DATA")
    flag("--save-minutes", type=float, default=10, help="time between checkpoints")
    flag("--log-every", type=int, default=50, help="steps between log lines")
    known = parser.parse_known_args()[0]
    data, family = Path(known.data).name, (known.arch or "").split("_")[0]
    recipe = recipes.get(family, recipes.get(data, recipes["imagenet"]))
    parser.set_defaults(**recipe, name=f"{Path(sys.argv[0]).stem}-{data}")
    return parser.parse_args()


def has_bf16():
    """Whether bfloat16 is fast here: on GPUs and CPUs with instructions for it."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(getattr(torch.cpu, "get_capabilities", dict)().get("avx512_bf16"))


def of_this_start(store, rank, world):
    """The part of torchrun's store that is of this start alone.

    The store outlives a restart (of torch 2.15 at least), and with it the addresses of the dead, to which some process
    would try to connect. So each process draws a name, the first one lists the names until all processes have found
    themselves in one and the same list, and that list is the part's name.
    """
    mine, agreed = os.urandom(8).hex(), None
    store.set(f"name {rank}", mine)
    while not agreed or store.add(agreed, 0) < world:
        if rank == 0:
            store.set("names", " ".join(store.get(f"name {r}").decode() for r in range(world)))
        names = store.get("names").decode()
        digest = hashlib.sha256(names.encode()).hexdigest()
        if mine in names and digest != agreed:
            agreed = digest
            store.add(agreed, 1)
        time.sleep(0.02)
    return dist.PrefixStore(agreed, store)


def set_up(seed):
    """Joins torchrun's process group (NCCL or gloo; none without a launcher), seeds, -> the device."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        store, rank, world = next(dist.rendezvous("env://", timeout=TIMEOUT))
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=of_this_start(store, rank, world),
                                rank=rank, world_size=world, timeout=TIMEOUT)
    torch.manual_seed(seed)
    return device


def rank_and_world():
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def distribute(model, device):
    """The model on its device, and the same ready for training: channels_last, SyncBatchNorm on CUDA, DDP."""
    model = model.to(device, memory_format=torch.channels_last)
    if not dist.is_initialized():
        return model, model
    if device.type == "cuda":  # on the CPU, BatchNorm's statistics stay those of each process
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    ids = [device.index] if device.type == "cuda" else None
    return model, nn.parallel.DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)


def seed_step(seed, step):
    """Makes all that is random on the device a function of (seed, step, rank); the generator for Photometric."""
    rng = random.Random(f"{seed} {step} {rank_and_world()[0]}")
    torch.manual_seed(rng.getrandbits(63))  # drop path and the like
    return torch.Generator().manual_seed(rng.getrandbits(63))


def write(path, save, previous=None):
    """save(file), so that `path` holds the old bytes or all of the new ones, whatever happens meanwhile.

    previous: a second name that the old file keeps.
    """
    part = path.with_suffix(".part")
    try:
        with open(part, "wb") as file:
            save(file)
            file.flush()
            os.fsync(file.fileno())
        if previous and path.exists():
            with contextlib.suppress(OSError):  # a file system without hard links keeps no previous one
                previous.unlink(missing_ok=True)
                os.link(path, previous)  # not renamed: at no moment is there no file at `path`
        os.replace(part, path)
    except (OSError, RuntimeError) as error:
        reason = error if isinstance(error, OSError) else error.__context__
        if not isinstance(reason, OSError):  # torch.save makes a RuntimeError of a failure to write, but not only of that
            raise
        part.unlink(missing_ok=True)
        raise UserError(f"cannot write {path} ({reason}); what it held before is intact: free space, run again") from error


def whole(path):
    """Whether the checkpoint at `path` is there and holds the bytes that were written: torch.load does not look at their
    checksums."""
    try:
        with zipfile.ZipFile(path) as file:
            return file.testzip() is None
    except Exception:  # whatever the bytes of the file make zipfile raise
        return False


def ignore_signals(_):
    """In data loading workers: a signal to the whole process group is the main process's to answer."""
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


class Run:
    """A training run in args.out/args.name: log.jsonl, last.pt, backbone.pt. Resumes from last.pt if there is one; where
    that is damaged, from previous.pt, the checkpoint before it."""

    FREE = {"out", "name", "workers", "save_minutes", "log_every"}  # flags that may change when a run is resumed

    def __init__(self, args, model, optimizer, data, device):
        self.args, self.model, self.optimizer, self.data, self.device = args, model, optimizer, data, device
        self.rank, self.world = rank_and_world()
        self.folder, self.step, self.stop, self.broken = Path(args.out) / args.name, 0, 0, set()
        if args.batch_size < 2 * self.world or args.batch_size % self.world:
            raise UserError(f"--batch-size {args.batch_size} must be at least 2 for each of the {self.world} processes and "
                            "divisible by their number")
        self.per_epoch = len(data) // args.batch_size
        if not self.per_epoch:
            raise UserError(f"--batch-size {args.batch_size} is larger than the {len(data)} images of {args.data}")
        self.total, self.peak_lr = args.epochs * self.per_epoch, args.base_lr * args.batch_size / 256
        # For votes that no GPU waits for
        self.control = dist.new_group(backend="gloo", timeout=TIMEOUT) if self.world > 1 else None
        problem = [self.claim() if self.rank == 0 else None]
        if self.world > 1:
            dist.broadcast_object_list(problem, group=self.control)
        if problem[0]:
            self.fail(problem[0])
        if (self.folder / "last.pt").exists():
            self.resume(read_checkpoint(self.folder / "last.pt"))
        if self.world > 1:
            seen = torch.tensor([self.step, -self.step, len(data), -len(data)])
            dist.all_reduce(seen, dist.ReduceOp.MAX, group=self.control)
            if seen[0] != -seen[1] or seen[2] != -seen[3]:
                raise UserError("the processes see different checkpoints or images: --out and --data must be shared by all")
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, lambda number, frame: setattr(self, "stop", number))
        if self.rank == 0:
            log = self.folder / "log.jsonl"
            kept = []
            for line in log.read_text(errors="replace").splitlines(keepends=True) if log.exists() else []:
                with contextlib.suppress(ValueError, TypeError, KeyError):  # a crash of the machine may leave any bytes
                    if line.endswith("\n") and json.loads(line)["step"] <= self.step:
                        kept.append(line)
            write(log, lambda file: file.write("".join(kept).encode()))
            self.log_file = open(log, "a")
            self.describe()

    def claim(self):
        """Makes the folder this run's alone, with a whole last.pt if there is any. -> what prevents it, or None."""
        name, last, previous = self.args.name, self.folder / "last.pt", self.folder / "previous.pt"
        if name in ("", ".", "..") or "/" in name or not name.isprintable():
            return f"--name {name!r} is no name of a folder in --out: take one without slashes and control characters"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.lock = open(self.folder / "lock", "w")
        except OSError as error:
            return f"cannot write in {self.folder} ({error}): give another --out"
        try:
            # The kernel drops a process's lock when it dies, however it dies; data loading workers, which may outlive it
            # for seconds, do not inherit it, as they would one of flock(). NFS keeps it for all machines; where a file
            # system has no locks, or keeps them for each machine alone, nothing but care prevents a second run.
            fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            return f"another run is at work in {self.folder}: wait for its end, or give another --name"
        except OSError as error:
            print(f"warning: cannot lock {self.folder} ({error}): start no second run in it", file=sys.stderr, flush=True)
        if (last.exists() or previous.exists()) and not whole(last):
            if not whole(previous):
                return f"{last} is damaged, and there is no whole previous.pt: give another --name"
            os.replace(previous, last)
            print(f"warning: {last} was missing or damaged: previous.pt, the checkpoint before it, takes its place",
                  file=sys.stderr, flush=True)

    def resume(self, state):
        now, then = {**vars(self.args), "images": len(self.data)}, state["args"]
        changed = [f"{key.replace('_', '-')} {then[key]} (now {value})" for key, value in now.items()
                   if key in then.keys() - self.FREE and value != then[key]]
        if changed:
            raise UserError(f"{self.folder} was started with {', '.join(changed)}: give the same, or another --name")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.broken = state["step"], set(state["broken"])

    def describe(self):
        def millions(module):
            return f"{sum(p.numel() for p in module.parameters()) / 1e6:.2f}M"
        rows = {**dict(sorted(vars(self.args).items())), "peak lr": f"{self.peak_lr:g}",
                "images": f"{len(self.data)}, {self.per_epoch} steps an epoch, {self.total} in all",
                "processes": f"{self.world} on {self.device.type}, {self.args.batch_size // self.world} images each",
                "parameters": f"{millions(self.model.backbone)} backbone, {millions(self.model)} in all"}
        for key, value in rows.items():
            print(f"  {key.replace('_', '-'):16} {value}")
        print(f"{self.folder}:", f"resumed at step {self.step}" if self.step else "a new run", flush=True)

    def set_lr(self):
        warmup = self.args.warmup_epochs * self.per_epoch
        lr = cosine_schedule(self.step, self.total, warmup, self.peak_lr, self.args.final_lr)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_ratio", 1)
        return lr

    def batches(self, sample):
        """Yields a Batch on the device for each step left; saves as time goes by, on a signal and at the end."""
        args, cuda = self.args, self.device.type == "cuda"
        order = Batches(len(self.data), args.batch_size, self.step, self.total, args.seed, self.rank, self.world)
        loader = torch.utils.data.DataLoader(  # forked workers share the data, and end soon after a parent that was killed
            Views(self.data, sample, args.seed), batch_sampler=order, pin_memory=cuda, num_workers=args.workers,
            worker_init_fn=ignore_signals, multiprocessing_context="fork" if args.workers else None)
        self.reset_clock()
        saved, vote = time.monotonic(), None
        asked = saved
        for batch in loader:
            self.waited += time.monotonic() - asked
            self.note_broken(batch.broken)
            views, *rest = batch
            yield Batch([v.to(self.device, non_blocking=True) for v in views],
                        *(t.to(self.device, non_blocking=True) for t in rest))
            self.step += 1
            wish = self.stop or int(time.monotonic() - saved >= 60 * args.save_minutes)  # a signal, or 1: save, or 0
            if self.world > 1:
                # All must save and stop at one step, though signals and clocks tell them at different ones: a vote that
                # is called at each step and read at the next, so that nobody waits.
                granted = 0
                if vote:
                    vote[1].wait()
                    granted = int(vote[0])
                ballot = torch.tensor(self.stop if granted else wish)  # what is granted is not asked for again
                vote, wish = (ballot, dist.all_reduce(ballot, dist.ReduceOp.MAX, group=self.control, async_op=True)), granted
            if wish or self.step == self.total:
                self.save(must=wish > 1 or self.step == self.total)
                saved = time.monotonic()
            if wish > 1:
                if self.rank == 0:
                    print(f"{signal.Signals(wish).name}: saved at step {self.step}; the same command resumes", flush=True)
                sys.exit(0)
            asked = time.monotonic()
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, signal.SIG_DFL)
        if self.world > 1:  # on the CPU each process has its own running statistics: all take those that were saved
            for buffer in self.model.buffers():
                dist.broadcast(buffer, 0)

    def note_broken(self, indices):
        for index in set(indices[indices >= 0].tolist()) - self.broken:
            self.broken.add(index)
            why = "but now it can be read"
            try:
                self.data.load(index)  # once more, as the reason stayed in the worker
            except Exception as error:
                why = str(error) or type(error).__name__
            print("warning:", printable(f"cannot read {self.data.name(index)} ({why}); another takes its place"),
                  file=sys.stderr, flush=True)

    def check_broken(self):
        if self.world > 1:
            everyone = [None] * self.world
            dist.all_gather_object(everyone, self.broken, group=self.control)
            self.broken = set().union(*everyone)
        if len(self.broken) > 0.01 * len(self.data):
            names = ", ".join(self.data.name(i) for i in sorted(self.broken))
            self.fail(f"over 1% of the images are unreadable ({len(self.broken)}): mend or remove {names}")

    def fail(self, why):
        """For what all processes find out together."""
        raise UserError(why if self.rank == 0 else "")

    def reset_clock(self):
        self.waited, self.clock, self.clock_step = 0.0, time.monotonic(), self.step

    def log(self, **metrics):
        """Every --log-every steps and at the last: a line in log.jsonl and one for the eye. Numbers or 0-d tensors.

        They are averaged over processes. Raises UserError, with every term, where the loss is not finite.
        """
        self.metrics, step = metrics, self.step + 1
        if step % self.args.log_every and step != self.total:
            return
        self.check_broken()
        values = [torch.as_tensor(v, dtype=torch.float64, device=self.device).detach() for v in metrics.values()]
        values = torch.stack(values)
        if self.world > 1:
            dist.all_reduce(values)
        line = dict(zip(metrics, (values / self.world).tolist()))
        if not math.isfinite(line["loss"]):
            self.fail(self.diverged(line))
        if self.rank == 0:
            seconds = time.monotonic() - self.clock
            rate = (step - self.clock_step) / seconds
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # bytes
            memory = torch.cuda.max_memory_allocated() if self.device.type == "cuda" else memory
            eta = (self.total - step) / rate
            line = dict(step=step, epoch=step / self.per_epoch, **line, broken=len(self.broken), eta_s=eta,
                        images_per_s=rate * self.args.batch_size, data_wait=self.waited / seconds, memory_gb=memory / 1e9)
            try:
                self.log_file.write(json.dumps(line) + "\n")
                self.log_file.flush()
            except OSError as error:  # the line stays in the buffer, to go out with a later one
                print(f"warning: cannot write to {self.folder / 'log.jsonl'} ({error})", file=sys.stderr, flush=True)
            print(f"epoch {line['epoch']:.2f}/{self.args.epochs}", *(f"{k} {line[k]:.4g}" for k in metrics),
                  f"{line['images_per_s']:.0f} img/s", f"wait {line['data_wait']:.0%}", f"{line['memory_gb']:.1f} GB",
                  f"eta {eta // 3600:.0f}:{eta % 3600 / 60:02.0f} h", *[f"broken {len(self.broken)}"] * bool(self.broken),
                  sep="  ", flush=True)
        self.reset_clock()

    def diverged(self, line):
        terms = ", ".join(f"{key} {float(value):g}" for key, value in line.items())
        return (f"NaN or infinity at step {self.step + 1} ({terms}); what is saved in {self.folder} is of an earlier, good "
                "step: try a lower --base-lr or --no-bf16 under another --name")

    def save(self, must):
        """last.pt and backbone.pt, if all weights are finite. A failure to write is fatal only if it `must` succeed.

        All processes call it, so that they find out together where weights are not finite; the first one writes.
        """
        if not all(p.isfinite().all() for p in self.model.parameters()):
            self.fail(self.diverged(self.metrics))
        if self.rank:
            return
        state = dict(model=self.model.state_dict(), optimizer=self.optimizer.state_dict(), step=self.step,
                     broken=sorted(self.broken), args={**vars(self.args), "images": len(self.data)})
        try:
            write(self.folder / "backbone.pt", lambda file: torch.save(self.model.backbone.state_dict(), file))
            write(self.folder / "last.pt", lambda file: torch.save(state, file), self.folder / "previous.pt")
        except UserError as error:
            if must:
                raise
            print(f"warning: {error}", file=sys.stderr, flush=True)  # the next checkpoint may find room
