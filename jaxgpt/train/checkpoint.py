"""Checkpoints: orbax for writing and reading, a sha256 of every file for trusting what is read."""

import dataclasses
import hashlib
import json
import os
import shutil
import threading
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging
from jax.experimental import multihost_utils
from orbax.checkpoint.checkpoint_managers import preservation_policy

from jaxgpt.objectives.ppo import VALUE_HEAD
from jaxgpt.train.workdir import write_atomic
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
    of its files' sha256, and a step is used only if all of them still agree. Use as a context manager.
    """

    def __init__(self, root: str, config: CheckpointConfig):
        self._root = os.path.abspath(root)
        self._worker: threading.Thread | None = None
        os.makedirs(self._root, exist_ok=True)
        if jax.process_index() == 0:
            _discard_untrusted(self._root)
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

    def __exit__(self, *_: object) -> None:
        self.wait()
        self._manager.close()

    def save(self, step: int, state: TrainState, meta: dict, metrics: dict[str, float] | None) -> None:
        """Begin to save; returns once the state is copied. metrics: for keep_best, may be None."""
        self.wait()
        latest = self.latest_step()
        if latest is not None and step <= latest:  # orbax would skip it without a word
            raise RuntimeError(f"{self._root}: step {step} cannot be saved after step {latest}.")
        self._manager.save(
            step,
            args=ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta)),
            metrics=metrics if metrics and "eval/loss" in metrics else None,
            force=True,
        )
        self._worker = threading.Thread(target=self._finish, args=(step,), name=f"checkpoint-{step}")
        self._worker.start()

    def _finish(self, step: int) -> None:
        self._manager.wait_until_finished()
        if jax.process_index() == 0:
            _write_digests(self._root, step)

    def wait(self) -> None:
        """Return when everything begun is committed and has its digests."""
        if self._worker is not None:
            self._worker.join()
            self._worker = None

    def latest_step(self) -> int | None:
        """The newest step, None if there is none."""
        return self._manager.latest_step()

    def best_step(self) -> int | None:
        """The kept step with the lowest eval/loss, None if none has one."""
        return self._manager.best_step()

    def restore(self, abstract: TrainState) -> tuple[TrainState, dict, int] | None:
        """The newest trusted (state, meta, step), laid out as `abstract` says, on whatever mesh; None if there is none."""
        step = self.latest_step()
        if step is None:
            return None
        args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract), meta=ocp.args.JsonRestore())
        restored = self._manager.restore(step, args=args)
        return restored["state"], restored["meta"], step


def good_steps(root: str) -> list[int]:
    """Steps under `root` whose checkpoints can be trusted, ascending; nothing is changed there."""
    return [step for step in _steps(root) if _damage(root, step) is None]


def restore_params(root: str, abstract: Params, *, step: int | None = None, ema: bool = False) -> Params:
    """The parameters alone of a checkpoint under `root`; nothing is changed there.

    step: a trusted one; None is the newest. ema: the optimizer's average of the parameters in their place.

    Raises ValueError where there is none, or where its parameters are not those of `abstract`.
    """
    root = os.path.abspath(root)
    if step is None:
        good = good_steps(root)
        if not good:
            raise ValueError(f"{root} holds no checkpoint that can be trusted.")
        step = good[-1]
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


def _write_digests(root: str, step: int) -> None:
    """Record a committed step's digests; forget those of steps that are gone."""
    os.makedirs(os.path.join(root, "digests"), exist_ok=True)
    write_atomic(_digest_path(root, step), json.dumps(_file_digests(os.path.join(root, str(step))), sort_keys=True))
    kept = {str(s) for s in _steps(root)}
    for name in os.listdir(os.path.join(root, "digests")):
        if name.removesuffix(".json") not in kept:
            os.remove(os.path.join(root, "digests", name))


def _damage(root: str, step: int) -> str | None:
    """What is wrong with a step in a few words, None if nothing is."""
    path = _digest_path(root, step)
    if not os.path.isfile(path):
        return "its digests were never written"
    with open(path) as file:
        recorded = json.load(file)
    found = _file_digests(os.path.join(root, str(step)))
    for name in sorted(recorded.keys() | found.keys()):
        if recorded.get(name) != found.get(name):
            what = (
                "is missing" if name not in found else "is new" if name not in recorded else "differs from its digest"
            )
            return f"{name} {what}"
    return None


def _discard_untrusted(root: str) -> None:
    """From the newest step down to the first good one, take out of orbax's sight what cannot be trusted.

    A step killed between its commit and its digests is dropped, as if it had been killed before; a damaged one is moved
    to root/damaged. Raises ValueError where damage leaves nothing to resume from.
    """
    for step in reversed(_steps(root)):
        damage = _damage(root, step)
        if damage is None:
            return
        folder = os.path.join(root, str(step))
        if not os.path.isfile(_digest_path(root, step)):
            logging.warning("Checkpoint %d was interrupted before its digests were written; it is dropped.", step)
            shutil.rmtree(folder)
            continue
        target = os.path.join(root, "damaged", str(step))
        os.makedirs(os.path.dirname(target), exist_ok=True)
        shutil.rmtree(target, ignore_errors=True)
        os.rename(folder, target)
        os.remove(_digest_path(root, step))
        logging.error(
            "Checkpoint %d is damaged (%s); it is moved to %s and the one before is used.", step, damage, target
        )
    if os.path.isdir(os.path.join(root, "damaged")):
        raise ValueError(
            f"Every checkpoint in {root} is damaged; they are kept in {os.path.join(root, 'damaged')}. Restore one from a "
            "copy, or use a new --workdir to start afresh."
        )
