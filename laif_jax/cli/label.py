"""`laif label ...`: a plan before a paid run, labels for a file of pairs, and how good labels are."""

import argparse
import json

from laif_jax.cli.label_store import Verb, add_store_verbs, open_store
from laif_jax.records.errors import LaifError


def _plan(options: argparse.Namespace) -> int:
    from laif_jax.config import PpoConfig, RewardConfig, StudyConfig, load_config
    from laif_jax.config.load import describes, labels_pairs
    from laif_jax.labeling.plan import Plan, show_plan

    if labels_pairs(options.config):
        return _plan_pairs(options)
    kind = describes(options.config)
    config = load_config(options.config, options.overrides, kind)
    if isinstance(config, RewardConfig):
        plan = Plan([], ["a reward model is trained on labels that are there already"])
    elif isinstance(config, PpoConfig):
        from laif_jax.studies.plan import plan_ppo

        plan = plan_ppo(config)
    else:
        from laif_jax.studies.plan import plan_study

        assert isinstance(config, StudyConfig)
        plan = plan_study(config)
    print(json.dumps(plan.to_json(), indent=2) if options.json else show_plan(plan))
    return 0


def _plan_pairs(options: argparse.Namespace) -> int:
    from laif_jax.config.load import load_label_config
    from laif_jax.labeling.pairs_plan import plan_pairs, show_pairs_plan

    plan = plan_pairs(load_label_config(options.config, options.overrides))
    if options.json:
        print(json.dumps(plan.to_json() | {"pairs": plan.pairs}, indent=2))
    else:
        print(show_pairs_plan(plan))
    return 0


def _run(options: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from laif_jax.config.load import load_label_config
    from laif_jax.labeling.pairs_plan import show_pairs_plan
    from laif_jax.studies.labels import Shown, run_labels
    from laif_jax.studies.table import spending_table

    config = load_label_config(options.config, options.overrides)
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
    progress, bars = Progress(*columns, console=Console(stderr=True)), {}

    def show(status) -> None:
        """A bar per job: a critic, or its drift probe."""
        counts = ", ".join(f"{count} {state}" for state, count in sorted(status.counts.items()))
        if status.id not in bars:
            bars[status.id] = progress.add_task("", total=status.total)
        text = status.stalled or f"{status.critic}: {counts}"
        progress.update(bars[status.id], total=status.total, completed=status.done, description=text)

    def plan(found) -> None:
        print(f"planned, before anything is sent:\n{show_pairs_plan(found)}\n", flush=True)

    def start(url: str) -> None:
        print(f"dashboard while it runs: {url}/", flush=True)
        progress.start()

    def spending(found) -> None:
        progress.stop()
        print(spending_table(found), end="")

    try:
        done = run_labels(config, Shown(plan, start, show, spending))
    finally:
        progress.stop()
    _show_labels(done)
    return 0


def _show_labels(done) -> None:
    """What a run gave, on the terminal."""
    from laif_jax.studies.quality_report import tier_text

    file = done.file
    counts = ", ".join(f"{count:,} {state}" for state, count in sorted(file.counts.items()))
    print(f"{file.path}: {len(file.pairs):,} pairs: {counts}")
    print(f"{file.calls:,} calls made, {file.cached:,} answers from the store")
    if file.tiers is not None:
        print(tier_text(file.tiers))
    if file.agreement is not None:
        print(f"agrees with your labels on {file.agreement:.1%} of {file.agreed_on:,} pairs (ties left out)")
    unlabelled = sum(count for state, count in file.counts.items() if state not in ("ok", "tie"))
    if unlabelled:
        print(
            f"{unlabelled:,} pairs have no label; `reason` says why. Failed ones are asked again by the same command"
        )
    for name, path in done.files.items():
        print(f"{name}: {path}")


def _example(options: argparse.Namespace) -> int:
    from laif_jax.labeling.pairs_example import write_example

    for file in write_example(options.folder, options.pairs):
        print(file)
    return 0


def _canary(options: argparse.Namespace) -> int:
    from laif_jax.config import load_config
    from laif_jax.labeling.canary import show

    config = load_config(options.config, options.overrides)
    from laif_jax.studies.canary import measure_critics

    reports = measure_critics(config, options.critic)
    if options.json:
        print(json.dumps({name: report.to_json() for name, report in reports.items()}))
        return 0
    print("\n\n".join(f"{name}: {show(report)}" for name, report in reports.items()))
    return 0


def _quality(options: argparse.Namespace) -> int:
    from laif_jax.labeling.judged import Judged, read_files, read_store

    judged = Judged()
    if options.store is not None or not options.files:
        options.store = options.store or "labels"
        store = open_store(options)
        try:
            read_store(store, judged)
        finally:
            store.close()
    read_files(options.files, judged)
    for path in options.pairs:
        pairs = _labelled_pairs(path)
        if not judged.label(pairs):
            raise LaifError(f"{path}: not one of its {len(pairs):,} pairs was judged here")
    from laif_jax.studies.quality import quality

    report = quality(judged, only=options.critic, own=options.own, samples=options.samples)
    files = {}
    if options.out is not None:
        from etils import epath

        from laif_jax.records import write_json
        from laif_jax.studies.quality_report import write_quality_report

        folder = epath.Path(options.out)
        name = ", ".join([*([options.store] if options.store else []), *options.files])
        files = {"quality": folder / "quality.json", "report": folder / "quality.html"}
        write_json(files["quality"], report)
        write_quality_report(files["report"], report, name=name)
    if options.json:
        print(json.dumps(report))
        return 0
    from laif_jax.studies.quality_report import quality_table

    print(quality_table(report), end="")
    for name, path in files.items():
        print(f"{name}: {path}")
    return 0


def _labelled_pairs(path: str):
    """The pairs of a file, or of the configuration of `laif label run` that names its columns."""
    from laif_jax.labeling.pair_files import read_pairs

    if not path.endswith((".yaml", ".yml")):
        return read_pairs(path)
    from laif_jax.config.load import load_label_config

    return read_pairs(load_label_config(path).pairs)


def add_verbs(verb: Verb, to: argparse._SubParsersAction) -> None:
    """Adds the verbs below `laif label`."""

    plan = verb("plan", _plan, "calls, tokens, dollars and time of labelling, before anything is sent", to)
    plan.add_argument("config", help="a YAML file of a study, of `laif ppo` or of `laif label run`")
    plan.add_argument("overrides", nargs="*", metavar="key=value", help="settings that win over the file's")
    plan.add_argument("--json", action="store_true", help="one JSON object")
    text = "how often a response can talk a study's critics into a verdict"
    canary = verb("canary", _canary, text, to)
    canary.add_argument("config", help="a study's YAML file")
    canary.add_argument("overrides", nargs="*", metavar="key=value", help="settings that win over the file's")
    canary.add_argument(
        "--critic", action="append", default=[], help="this critic, or judge (may be repeated; default: all)"
    )
    canary.add_argument("--json", action="store_true", help="one JSON object")
    run = verb("run", _run, "label a file of pairs; the same command again asks only for what is missing", to)
    run.add_argument("config", help="a YAML file; `laif label example` writes one")
    run.add_argument("overrides", nargs="*", metavar="key=value", help="settings that win over the file's")
    example = verb("example", _example, "write made-up pairs and a configuration that labels them", to)
    example.add_argument("folder", nargs="?", default=".")
    example.add_argument("--pairs", type=int, default=100, metavar="N", help="how many (default: 100)")
    text = "how good the labels of a store are: agreement, biases, consistency, calibration; nobody is asked"
    quality = verb("quality", _quality, text, to)
    quality.add_argument("files", nargs="*", help="exports, or files of judgements, instead of a store")
    quality.add_argument("--store", help="its folder or address (default: labels, if no file is given)")
    quality.add_argument(
        "--pairs",
        action="append",
        default=[],
        metavar="FILE",
        help="pairs with labels in `human`; or the YAML file of `laif label run`, which names their columns",
    )
    quality.add_argument("--critic", default="", metavar="TEXT", help="critics whose name or model holds it")
    quality.add_argument(
        "--own",
        action="append",
        default=[],
        metavar="GENERATOR",
        help="a generator that is the critic's model",
    )
    quality.add_argument("--out", metavar="FOLDER", help="write quality.json and quality.html there")
    quality.add_argument(
        "--samples", type=int, default=1000, help="resamples of the intervals (default: 1000)"
    )
    quality.add_argument("--json", action="store_true", help="one JSON object")
    quality.set_defaults(new=False)
    add_store_verbs(verb, to)
