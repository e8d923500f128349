"""Checkpoints: orbax for writing and reading, a sha256 of every file for trusting what is read."""

import dataclasses
import errno
import hashlib
import itertools
import json
import os
import sys
import threading
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from absl import logging
from jax.experimental import multihost_utils
from orbax.checkpoint.checkpoint_managers import preservation_policy

from jaxgpt.models.decoder import VALUE_HEAD
from jaxgpt.runs.workdir import write_atomic
from jaxgpt.types import Params, TrainState


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """save_interval_steps: updates between saves (the last update is always saved). max_to_keep: the newest to keep.
    keep_best: of the others, so many with the lowest eval/loss are kept too. async_save: training goes on while a
    checkpoint is written.
    """

    save_interval_steps: int = 500
    max_to_keep: int = 2
    keep_best: int = 0
    async_save: bool = True

    def __post_init__(self):
        for name, least in (("save_interval_steps", 1), ("max_to_keep", 1), ("keep_best", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"checkpoint.{name} must be at least {least}, not {getattr(self, name)}.")


class Checkpointer:
    """The checkpoints of one run: `root/STEP/` by orbax, `root/digests/STEP.json` by us.

    orbax commits a step by renaming its folder, but does not notice a changed byte. So each committed step gets a list
    of its files' sha256, and a step that disagrees with its list is not used. One that was committed and has no list (the
    run was killed before it was written, or it was lost in a copy) is used, with a word, since what it holds may be all
    there is. Nothing is deleted but what max_to_keep and keep_best say: a damaged step is moved to `root/damaged/`. Use as
    a context manager.
    """

    def __init__(self, root: str, config: CheckpointConfig):
        self._root = os.path.abspath(root)
        self._worker: threading.Thread | None = None
        self._error: BaseException | None = None
        os.makedirs(self._root, exist_ok=True)
        if jax.process_index() == 0:
            _set_damaged_aside(self._root)
        _sync("checkpoints_verified")
        policies: list[Any] = [preservation_policy.LatestN(config.max_to_keep)]
        if config.keep_best:
            policies.append(
                preservation_policy.BestN(
                    get_metric_fn=lambda metrics: -metrics["eval/loss"],
                    n=config.keep_best,
                    keep_checkpoints_without_metrics=False,
                )
            )
        self._manager = ocp.CheckpointManager(
            self._root,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=preservation_policy.AnyPreservationPolicy(policies),
                # Without best_fn orbax stores no metrics; with it, it warns of every step that has none.
                best_fn=(lambda metrics: metrics["eval/loss"]) if config.keep_best else None,
                best_mode="min",
                cleanup_tmp_directories=True,
                enable_async_checkpointing=config.async_save,
            ),
        )

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self.wait()
        except Exception as error:
            if kind is None:
                raise
            logging.error("The last checkpoint was not saved either (%s).", error)  # the first error is on its way
        finally:
            self._manager.close()

    def save(self, step: int, state: TrainState, meta: dict, metrics: dict[str, float] | None) -> None:
        """Begin to save; returns once the state is copied. metrics: for keep_best, may be None.

        Raises FloatingPointError, with nothing saved, where a parameter is not finite; and what went wrong in the save
        before.
        """
        self.wait()
        latest = self.latest_step()
        if latest is not None and step <= latest:  # orbax would skip it without a word
            raise RuntimeError(f"{self._root}: step {step} cannot be saved after step {latest}.")
        if not bool(_all_finite(state.params)):
            raise FloatingPointError(
                f"The parameters are not finite after step {step}; they are not saved, the run stops and the last good "
                "checkpoint stays. A lower optimizer.learning_rate or a longer optimizer.warmup_steps may help."
            )
        self._manager.save(
            step,
            args=ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta)),
            metrics=metrics if metrics and "eval/loss" in metrics else None,
            force=True,
        )
        self._worker = threading.Thread(target=self._finish, args=(step,), name=f"checkpoint-{step}")
        self._worker.start()

    def _finish(self, step: int) -> None:
        try:
            self._manager.wait_until_finished()
            if jax.process_index() == 0:
                _write_digests(self._root, step)
        except BaseException as error:
            self._error = error  # for `wait`: an error that ends in a thread is lost

    def wait(self) -> None:
        """Return when everything begun is committed and has its digests; raises what went wrong meanwhile."""
        if self._worker is not None:
            self._worker.join()
            self._worker = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def latest_step(self) -> int | None:
        """The newest step, None if there is none."""
        return self._manager.latest_step()

    def best_step(self) -> int | None:
        """The kept step with the lowest eval/loss, None if none has one."""
        return self._manager.best_step()

    def restore(self, abstract: TrainState) -> tuple[TrainState, dict, int] | None:
        """The newest good (state, meta, step), laid out as `abstract` says, on whatever mesh; None if there is none.

        A step that could not be verified has been read whole when this returns, and has its digests then.
        """
        args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract), meta=ocp.args.JsonRestore())
        while (step := self.latest_step()) is not None:
            is_verified = _recorded_digests(self._root, step) is not None
            try:
                restored = self._manager.restore(step, args=args)
            except Exception as error:
                if is_verified or jax.process_count() > 1 or _is_of_the_machine(error):
                    raise  # not the files' fault; or one that all processes would have to agree on
                _set_aside(self._root, step, f"it has no digests, and cannot be read: {error}")
                _refuse_fresh_start(self._root)
                self._manager.reload()
                continue
            if not is_verified and jax.process_index() == 0:
                _write_digests(self._root, step)
            return restored["state"], restored["meta"], step
        return None


def _is_of_the_machine(error: BaseException) -> bool:
    """Whether a checkpoint cannot be read for want of memory, files or permission: another time it may be."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno not in (errno.ENOENT, errno.EIO)
    return isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)


@jax.jit
def _all_finite(params: Params) -> jax.Array:
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(params)]))


def good_steps(root: str) -> list[int]:
    """Steps under `root` whose checkpoints are not known to be damaged, ascending; nothing is changed there."""
    return [step for step in _steps(root) if _damage(root, step) is None]


def newest_good_step(root: str) -> int:
    """The newest step under `root` that is not damaged; what is passed over, or cannot be verified, is said in a line.

    Raises ValueError where there is none. Nothing is changed there.
    """
    for step in reversed(_steps(root)):
        damage = _damage(root, step)
        if damage is not None:
            print(f"{root}: step {step} is damaged ({damage}) and is passed over.", file=sys.stderr, flush=True)
            continue
        if _recorded_digests(root, step) is None:
            print(f"{root}: step {step} is loaded, but has no digests to verify it by.", file=sys.stderr, flush=True)
        return step
    raise ValueError(f"{root} holds no checkpoint that can be trusted.")


def checkpoint_digest(root: str, step: int) -> str:
    """The sha256 (hex) over the digests of a step's files, as they were recorded when it was saved.

    Raises ValueError where they are not there.
    """
    recorded = _recorded_digests(root, step)
    if recorded is None:
        raise ValueError(f"{_digest_path(root, step)} is missing or damaged, so step {step} cannot be verified.")
    return _digest_of(recorded)


def check_named_step(root: str, step: int, digest: str | None) -> None:
    """ValueError where a step is not there, or is not the one whose `checkpoint_digest` a manifest names.

    digest: None where the manifest names the step alone; the digests beside it decide then.
    """
    named = f"{root}: step {step}, which manifest.json names,"
    restore = "restore it from a copy, or remove manifest.json to go on from an older one."
    if step not in _steps(root):
        raise ValueError(f"{named} is missing; {restore}")
    if digest is not None and _digest_of(_file_digests(os.path.join(root, str(step)))) == digest:
        return
    damage = _damage(root, step)
    if damage is None and digest is not None:
        damage = "it is another checkpoint than the one that was saved when the run finished"
    if damage is not None:
        raise ValueError(f"{named} is damaged: {damage}; {restore}")


def stored_sources(root: str) -> dict[str, str] | None:
    """What the newest readable checkpoint under `root` was made from, as `Stage.sources`; None without one.

    A resume sees to it that all steps of a run name the same.
    """
    for step in reversed(_steps(root)):
        try:
            with open(os.path.join(root, str(step), "meta", "metadata"), encoding="utf-8") as file:
                return dict(json.load(file)["sources"])
        except (OSError, ValueError, KeyError, TypeError):
            continue  # a damaged step, of which a resume will tell
    return None


def restore_params(root: str, abstract: Params, step: int, *, ema: bool = False) -> Params:
    """The parameters alone of a step under `root`, whose files are not verified here; nothing is changed there.

    ema: the optimizer's average of the parameters in their place.

    Raises ValueError where its parameters are not those of `abstract`.
    """
    root = os.path.abspath(root)
    path = os.path.join(root, str(step))
    json_handlers = {name: ocp.JsonCheckpointHandler() for name in ("meta", "metrics")}
    handler = ocp.CompositeCheckpointHandler(state=ocp.PyTreeCheckpointHandler(), **json_handlers)
    with ocp.Checkpointer(handler) as reader:
        stored = reader.metadata(path).item_metadata["state"].tree
        place = _place_of_params(stored, ema, path)
        kept, others = _without_value_head(_at(stored, place))
        _check_shapes(kept, abstract, path)
        target = jax.tree.map(lambda _: ocp.PLACEHOLDER, stored)  # what is not read
        _at(target, place[:-1])[place[-1]] = abstract | jax.tree.map(lambda _: ocp.PLACEHOLDER, others)
        arguments = ocp.args.PyTreeRestore(
            item=target, restore_args=ocp.checkpoint_utils.construct_restore_args(target)
        )
        state = reader.restore(path, args=ocp.args.Composite(state=arguments))["state"]
        return _without_value_head(_at(state, place))[0]


def _without_value_head(params: Params) -> tuple[Params, Params]:
    """(the parameters of the model, the value head beside them, where there is one)."""
    others = {name: leaf for name, leaf in params.items() if name == VALUE_HEAD}
    return {name: leaf for name, leaf in params.items() if name not in others}, others


def _place_of_params(stored: Any, ema: bool, path: str) -> list:
    """The keys that lead from a stored state to its parameters."""
    policy = ["policy"] if "policy" in stored else []  # the state of reinforcement learning holds a critic, too
    if not ema:
        return [*policy, "params"]
    steps = _at(stored, [*policy, "opt_state"])
    last = len(steps) - 1  # where make_optimizer puts it
    if not (isinstance(steps, list) and isinstance(steps[last], dict) and "ema" in steps[last]):
        raise ValueError(f"{path} keeps no average of the parameters: optimizer.ema_decay was 0.")
    return [*policy, "opt_state", last, "ema"]


def _at(nested: Any, place: list) -> Any:
    for key in place:
        nested = nested[key]
    return nested


def _check_shapes(stored: Any, abstract: Params, path: str) -> None:
    shapes = lambda t: {jax.tree_util.keystr(k): tuple(v.shape) for k, v in jax.tree_util.tree_leaves_with_path(t)}
    ours, theirs = shapes(abstract), shapes(stored)
    for name in sorted(ours.keys() | theirs.keys()):
        if ours.get(name) != theirs.get(name):
            raise ValueError(
                f"{path} holds other parameters than the model: {name} is {theirs.get(name, 'missing')} there and "
                f"{ours.get(name, 'missing')} in the config."
            )


def _sync(name: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def _steps(root: str) -> list[int]:
    """Committed steps, ascending."""
    return sorted(int(name) for name in os.listdir(root) if name.isdecimal()) if os.path.isdir(root) else []


def _digest_path(root: str, step: int) -> str:
    return os.path.join(root, "digests", f"{step}.json")


def _file_digests(folder: str) -> dict[str, str]:
    digests = {}
    for parent, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(parent, name)
            with open(path, "rb") as file:
                digests[os.path.relpath(path, folder)] = hashlib.file_digest(file, "sha256").hexdigest()
    return digests


def _digest_of(digests: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()


def _write_digests(root: str, step: int) -> None:
    """Record a committed step's digests; forget those of steps that are gone."""
    os.makedirs(os.path.join(root, "digests"), exist_ok=True)
    write_atomic(_digest_path(root, step), json.dumps(_file_digests(os.path.join(root, str(step))), sort_keys=True))
    kept = {str(s) for s in _steps(root)}
    for name in os.listdir(os.path.join(root, "digests")):
        if name.removesuffix(".json") not in kept:
            os.remove(os.path.join(root, "digests", name))


def _recorded_digests(root: str, step: int) -> dict[str, str] | None:
    """The digests of a step's files, None where they were never written, were lost, or cannot be read."""
    try:
        with open(_digest_path(root, step), encoding="utf-8") as file:
            recorded = json.load(file)
    except (FileNotFoundError, ValueError, RecursionError):
        return None
    return recorded if isinstance(recorded, dict) and recorded else None


def _damage(root: str, step: int) -> str | None:
    """In which file a step is not what its digests say; None where it is, or where it has none."""
    recorded = _recorded_digests(root, step)
    if recorded is None:
        # Without the mark that orbax leaves in a committed step not even that is known.
        marked = os.path.isfile(os.path.join(root, str(step), "_CHECKPOINT_METADATA"))
        return None if marked else "it has neither digests nor the mark of a complete checkpoint"
    found = _file_digests(os.path.join(root, str(step)))
    for name in sorted(recorded.keys() | found.keys()):
        if recorded.get(name) != found.get(name):
            what = "is missing" if name not in found else "is new" if name not in recorded else "has another sha256"
            return f"{name} {what}"
    return None


def _set_damaged_aside(root: str) -> None:
    """From the newest step down to the first usable one, move those that are damaged to root/damaged.

    Raises ValueError where damage leaves nothing to resume from.
    """
    for step in reversed(_steps(root)):
        damage = _damage(root, step)
        if damage is not None:
            _set_aside(root, step, damage)
            continue
        if _recorded_digests(root, step) is None:
            logging.warning(
                "Checkpoint %d has no digests (the run was killed before they were written, or they were lost or damaged), "
                "so it cannot be verified; the run goes on from it.", step,
            )  # fmt: skip
        return
    _refuse_fresh_start(root)


def _set_aside(root: str, step: int, damage: str) -> None:
    """Move a step, with its digests, out of orbax's sight to root/damaged."""
    os.makedirs(os.path.join(root, "damaged"), exist_ok=True)
    targets = (os.path.join(root, "damaged", f"{step}-{i}" if i else str(step)) for i in itertools.count())
    target = next(path for path in targets if not os.path.exists(path))
    os.rename(os.path.join(root, str(step)), target)
    if os.path.exists(_digest_path(root, step)):
        os.replace(_digest_path(root, step), f"{target}.json")
    logging.error("Checkpoint %d is damaged (%s); it is moved to %s and the one before is used.", step, damage, target)


def _refuse_fresh_start(root: str) -> None:
    """ValueError where every checkpoint that there was has been set aside."""
    if not _steps(root) and os.path.isdir(os.path.join(root, "damaged")):
        raise ValueError(
            f"Every checkpoint in {root} is damaged; they are kept in {os.path.join(root, 'damaged')}. Restore one from a "
            "copy, or use a new --workdir to start afresh."
        )
