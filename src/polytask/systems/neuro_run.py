"""`polytask run neuroformer --data session.nwb --target speed`: train, decode, generate, read out.

Leaves the model, tables of figures and a page with pictures. Without `--data` a circuit of 30
neurons is simulated, whose wiring is known, so that the readout can be judged.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field, PositiveInt, field_validator

from polytask import files
from polytask.configs import load_yaml, parse
from polytask.data.spikes import Recording
from polytask.errors import ConfigError, suggestion
from polytask.infer.neuro.settings import Kind, NeuroSettings
from polytask.systems.base import Outcome, Say, SystemConfig


class NeuroRunConfig(SystemConfig):
    """A recording (.nwb or .npz) and what to make of it.

    `config` is a YAML file with any of these keys; what is given on the command line goes first.
    """

    config: Path | None = None
    dt: float | None = Field(None, gt=0)  # bin, seconds; None: as the file says, else 0.01
    read: dict[str, Any] = Field(default_factory=dict)  # options of Recording.from_nwb or from_npz
    target: tuple[str, ...] = ()  # behaviour to decode
    stimulus: bool = True  # look at the frames, where there are any
    model: NeuroSettings = NeuroSettings(block=100, prev_block=100, prev_window=0.1, dropout=0.0)
    steps: PositiveInt = 600  # of pretraining
    lr: float = Field(4e-3, gt=0, lt=1)
    batch_size: PositiveInt = 64
    fraction: float = Field(0.1, gt=0, le=1)  # of the train windows whose labels are used
    finetune_steps: PositiveInt = 150
    train: Literal["head", "all"] = "all"  # what finetuning changes
    finetune_lr: float = Field(2e-3, gt=0, lt=1)
    trials: PositiveInt = 4
    horizon: PositiveInt = 20  # windows that run freely before starting again from the record
    seconds: float = Field(300.0, gt=5)  # of the simulated recording
    seed: int = 0

    @field_validator("target", mode="before")
    @classmethod
    def _names(cls, value: Any) -> Any:
        """'a,b' is two variables."""
        return tuple(v.strip() for v in value.split(",")) if isinstance(value, str) else value


def neuro_run(config: NeuroRunConfig, say: Say) -> Outcome:
    """Pretrain (resuming where it was interrupted), finetune, judge on the last fifth, draw."""
    from polytask.infer.neuro.neuroformer import Neuroformer
    from polytask.report.neuro_page import neuro_report
    from polytask.systems.neuro_pictures import neuro_record

    config = _with_file(config)
    recording, circuit, name = _recording(config, say)
    folder = config.out / f"neuroformer-{name}"
    folder.mkdir(parents=True, exist_ok=True)
    targets = _targets(config, recording)
    neuro = Neuroformer(recording, _settings(config, recording, targets), seed=config.seed)
    say(
        f"{recording.n_units} units, {recording.duration:.0f} s, {len(neuro.windows)} windows, "
        f"{len(neuro.windows.test)} of them held out; pretraining for {config.steps} steps"
    )
    untrained = neuro.score("test")
    neuro.pretrain(config.steps, lr=config.lr, batch_size=config.batch_size, folder=folder / "run")
    figures: dict[str, Any] = {
        "test": neuro.score("test"),
        "test shuffled past": neuro.score("test", shuffled=True),
        "test untrained": untrained,
    }
    say("generating the held-out part")
    drawn = {
        "ahead": neuro.generate("test", trials=config.trials, true_past=True),
        "free": neuro.generate("test", trials=config.trials, horizon=config.horizon),
    }
    figures |= _activity(neuro, drawn)
    say("reading connections from attention")
    readouts = {kind: neuro.connectivity(kind) for kind in ("mean", "rollout")}  # type: ignore[arg-type]
    rows = neuro.windows.train[:2000]
    readouts["ablation"] = neuro.connectivity("ablation", rows)
    if circuit is not None:
        figures["edges"] = _edges(readouts, circuit)
    decoded = {}
    for target in targets:
        say(f"finetuning on {config.fraction:.0%} of the labels of '{target}'")
        tuned = Neuroformer(recording, neuro.settings, seed=config.seed)
        tuned.model.load_state_dict(neuro.model.state_dict())
        tuned.finetune(
            target,
            fraction=config.fraction,
            train=config.train,
            steps=config.finetune_steps,
            lr=config.finetune_lr,
        )
        decoded[target] = tuned.decode(target)
        figures[f"decode {target}"] = {
            key: value
            for key in ("r", "r2", "accuracy")
            if np.isfinite(value := getattr(decoded[target], key))
        }
        tuned.save(folder / f"decoder-{target}")
    lines = _lines(figures)
    edges = None if circuit is None else circuit.edges
    record = neuro_record(
        name, neuro, drawn, readouts, decoded, figures, lines, edges, folder / "run"
    )
    page = neuro_report(folder, record)
    tables: dict[str, Any] = {f"{k}_mean": v.mean for k, v in readouts.items()}
    tables |= {f"{k}_count": v.count for k, v in readouts.items()}
    with files.writing(folder / "connectivity.npz") as aside, aside.open("wb") as handle:
        np.savez_compressed(handle, **tables)
    with files.writing(folder / "generated.npz") as aside, aside.open("wb") as handle:
        free = drawn["free"]
        np.savez_compressed(handle, trial=free.trial, unit=free.unit, step=free.step)
    files.write_json(folder / "figures.json", figures)
    model = neuro.save(folder / "model")
    names = ("connectivity.npz", "generated.npz", "figures.json")
    return Outcome(folder, figures, lines, [page, *(folder / n for n in names), model])


def _with_file(config: NeuroRunConfig) -> NeuroRunConfig:
    """Keys of the YAML file where the command line is silent."""
    if config.config is None:
        return config
    given = load_yaml(config.config)
    if isinstance(given.get("data"), str):
        given["data"] = (config.config.parent / given["data"]).resolve()
    if "config" in given:
        raise ConfigError(f"{config.config}: 'config' cannot name another file")
    own = {name: getattr(config, name) for name in config.model_fields_set}
    return parse(NeuroRunConfig, {**given, **own}, str(config.config))


def _recording(config: NeuroRunConfig, say: Say) -> tuple[Recording, Any, str]:
    """The user's recording, or a simulated circuit with its wiring."""
    if config.data is not None:
        options = config.read if config.dt is None else {**config.read, "dt": config.dt}
        _check_options(config.data, options)
        return Recording.from_file(config.data, **options), None, config.data.stem
    from polytask.systems.testbeds.circuits import speed_population

    say(f"no --data given: simulating {config.seconds:.0f} s of a circuit of 30 neurons")
    circuit = speed_population(config.seed, config.seconds)
    return circuit.recording, circuit, "circuit"


def _check_options(path: Path, options: dict[str, Any]) -> None:
    """`ConfigError` for an option that the file's reader does not have."""
    from polytask.data.spikes_nwb import read_nwb

    reader: Any = read_nwb if path.suffix == ".nwb" else Recording.from_arrays
    known = [name for name in inspect.signature(reader).parameters if name != "path"]
    for name in options:
        if name not in known:
            raise ConfigError(
                f"read: '{name}' is no option for {path.name}.{suggestion(name, known)}"
            )


def _targets(config: NeuroRunConfig, recording: Recording) -> dict[str, Kind]:
    """Targets with their kind: labels are classified, numbers regressed. Without data: speed."""
    names = config.target or tuple(config.model.targets)
    if not names and config.data is None:
        names = ("speed",)
    chosen: dict[str, Kind] = {
        name: "classification" if name in recording.classes else "regression" for name in names
    }
    return {**chosen, **config.model.targets}


def _settings(
    config: NeuroRunConfig, recording: Recording, targets: dict[str, Kind]
) -> NeuroSettings:
    """The model's settings, with frames where the recording has some and nobody chose."""
    change: dict[str, Any] = {"targets": targets}
    chosen = config.model.model_fields_set
    if config.stimulus and recording.frames is not None and "frame_window" not in chosen:
        rate, size = recording.frame_rate or 1.0, recording.frames.shape[1:]
        change["frame_window"] = 3 / rate
        if "kernel" not in chosen:
            change["kernel"] = (3, max(1, size[0] // 4), max(1, size[1] // 4))
    known = config.model.model_dump(mode="json", exclude_unset=True)
    return parse(NeuroSettings, {**_defaults(), **known, **change}, "model")


def _defaults() -> dict[str, Any]:
    model = NeuroRunConfig.model_fields["model"].default
    found: dict[str, Any] = model.model_dump(mode="json", exclude_unset=True)
    return found


def _activity(neuro: Any, drawn: dict[str, Any]) -> dict[str, Any]:
    from polytask.evaluate.spikes import population_scores

    true = neuro.windows.counts(neuro.windows.test, 1)[:, 0]
    found = {}
    for name, generated in drawn.items():
        each = [population_scores(true, trial) for trial in generated.counts]
        whole = population_scores(true, generated.counts.mean(0))
        found[f"generated {name}"] = {
            key: float(value) if np.isfinite(value) else None
            for key, value in (
                ("f1", np.mean([s.sets.f1 for s in each])),
                ("precision", np.mean([s.sets.precision for s in each])),
                ("recall", np.mean([s.sets.recall for s in each])),
                ("rate_r", whole.rate_r),
                ("cell_r", whole.cell_r),
                ("count_ratio", np.mean([s.count_ratio for s in each])),
            )
        }
    return found


def _edges(readouts: dict[str, Any], circuit: Any) -> dict[str, Any]:
    from polytask.evaluate.spikes import edge_scores

    found = {}
    for kind, readout in readouts.items():
        edges = edge_scores(np.abs(readout.mean), circuit.edges)
        found[kind] = {"auroc": edges.forward, "transposed": edges.transposed}
    return found


def _lines(figures: dict[str, Any]) -> list[str]:
    test, strange = figures["test"], figures["test shuffled past"]
    ahead = figures["generated ahead"]
    lines = [
        f"next unit: {test['id']:.3f} nats, with a strange past {strange['id']:.3f}, untrained "
        f"{figures['test untrained']['id']:.3f}",
        f"generated one window ahead: F1 {ahead['f1']:.3f}, spikes {ahead['count_ratio']:.2f} x "
        "the recorded ones",
    ]
    for name, found in figures.items():
        if name.startswith("decode "):
            said = ", ".join(f"{key} {value:.3f}" for key, value in found.items())
            lines.append(f"{name}: {said}")
    for kind, found in figures.get("edges", {}).items():
        lines.append(
            f"true edges from {kind}: AUROC {found['auroc']:.3f}, against the transposed graph "
            f"{found['transposed']:.3f}"
        )
    return lines
