"""One-pass evaluation of models on a folder of sequences.

    python -m evaluation.ope MODEL... --sequences DIR --out DIR [--layout L] [--processes N] [--cluster ADDRESS]

Runs every tracker over every sequence, keeps a result file for each, and prints the tables; ``python -m
evaluation.report OUT`` makes the page with plots and frames. A sequence whose result is complete is not run again, so a
run that was stopped goes on where it was. Results belong to a model and its tracking parameters: those of another one
under the same name are refused, and with ``--rerun`` deleted.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from evaluation.processes import warm_up

if __name__ == "__main__" and "--processes" in sys.argv:
    warm_up()  # the other processes load their libraries while this one loads its own

from tqdm import tqdm

from evaluation.layouts import LAYOUTS, SequenceRef, find_sequences
from evaluation.parallel import Job, run_jobs
from evaluation.peers import PEERS
from evaluation.records import delete_record, read_header, records_of, write_attributes, write_record
from evaluation.sequences import image_paths
from evaluation.tables import load_runs, markdown, tables, write_rows
from evaluation.trackers import TrackerSpec, model_spec, peer_spec
from siamtrack.cluster import LOCAL_CLUSTER
from siamtrack.runners import BACKENDS, PRECISION_CHOICES


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status: 0 done, 1 a sequence failed, 2 unusable input, 130 stopped by Ctrl-C."""
    options = _parser().parse_args(arguments)
    try:
        specs = [
            model_spec(text, options.backend, options.threads, options.tracking, options.precision)
            for text in options.models
        ]
        specs += [peer_spec(name) for name in options.peers]
        refs = choose(find_sequences(options.sequences.resolve(), options.layout), options.names)
        jobs = plan(specs, refs, options.out, options.rerun)
        failed = work(jobs, options.out, options.processes, options.cluster)
        runs = load_runs([options.out], options.sequences, [spec.name for spec in specs])
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        print(f"ope: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("ope: stopped; the same command goes on with the sequences that are not finished", file=sys.stderr)
        return 130
    write_rows(options.out / "results.csv", runs)
    page = markdown(tables(runs))
    (options.out / "results.md").write_text(page, encoding="utf-8")
    print(page)
    for line in failed:
        print(f"ope: failed: {line}", file=sys.stderr)
    return 1 if failed else 0


def choose(refs: Sequence[SequenceRef], names: Sequence[str]) -> list[SequenceRef]:
    """The sequences named, or all where none is; ``@FILE`` names those in a file's lines, such as a test split.

    Raises:
        OSError: a file of names cannot be read.
        ValueError: a name is not there.
    """
    if not names:
        return list(refs)
    wanted: list[str] = []
    for name in names:
        wanted += Path(name[1:]).read_text(encoding="utf-8").split() if name.startswith("@") else [name]
    known = {ref.name: ref for ref in refs}
    absent = [name for name in wanted if name not in known]
    if absent:
        raise ValueError(f"no sequence called {', '.join(absent[:5])}{', ...' * (len(absent) > 5)}; see --sequences")
    return [known[name] for name in dict.fromkeys(wanted)]


def plan(specs: Sequence[TrackerSpec], refs: Sequence[SequenceRef], out: Path, rerun: bool = False) -> list[Job]:
    """What is left to do: jobs without a complete result.

    With `rerun`, results of another model, other parameters or other data under these names are deleted.

    Raises:
        ValueError: nothing to evaluate, two trackers of one name, or results of another model or other parameters.
    """
    names = [spec.name for spec in specs]
    if not names:
        raise ValueError("nothing to evaluate: name a model, or a peer with --peers")
    if len(set(names)) < len(names):
        raise ValueError(f"two trackers of one name among {', '.join(names)}; write NAME=MODEL to rename one")
    digests = {ref.name: _digest(ref) for ref in refs}
    jobs = []
    for spec in specs:
        fingerprint = spec.fingerprint()
        found = {path: header for path in records_of(out, spec.name) if (header := read_header(path))}
        stale = {
            path: header
            for path, header in found.items()
            if header.fingerprint != fingerprint or (digests.get(header.sequence) or header.digest) != header.digest
        }
        if stale and not rerun:
            path, header = next(iter(stale.items()))
            raise ValueError(
                f"{out} holds {len(stale)} results called {spec.name} that are not of this model, these tracking "
                f"parameters or this data ({fingerprint}), such as {path.stem} ({header.fingerprint}); give --rerun to "
                f"replace them, another --out, or another name (NAME={spec.model or spec.peer})"
            )
        for path in stale:  # now, so that no table mixes them with new ones, however far this run comes
            delete_record(path)
        done = {header.sequence: path for path, header in found.items() if path not in stale}
        for ref in refs:
            if ref.name not in done:
                jobs.append(Job(spec, ref, _length(ref)))
            elif found[done[ref.name]].attributes != ref.attributes():
                write_attributes(done[ref.name], ref.attributes())
        left = sum(ref.name not in done for ref in refs)
        print(f"{spec.name} ({fingerprint}): {left} sequences to run, {len(refs) - left} done before", file=sys.stderr)
    return jobs


def _digest(ref: SequenceRef) -> str:
    """Its digest; "" where a part of it is missing: what was made of it once counts, else its job says what it is."""
    try:
        return ref.digest()
    except OSError:
        return ""


def _length(ref: SequenceRef) -> int:
    try:
        return len(image_paths(ref.images))
    except OSError:
        return 0


def work(jobs: Sequence[Job], out: Path, processes: int, cluster: str | None) -> list[str]:
    """Do the jobs and write their results; returns a line for each that failed."""
    failed = []
    fingerprints = {spec: spec.fingerprint() for spec in {job.spec for job in jobs}}
    with tqdm(total=sum(job.frames for job in jobs), unit="frame", disable=None) as bar:
        for outcome in run_jobs(jobs, processes, cluster):
            spec, ref = outcome.job.spec, outcome.job.ref
            if outcome.sequence is None or outcome.result is None:
                failed.append(f"{spec.name} on {ref.name}: {outcome.error}")
            else:
                write_record(out, spec.name, fingerprints[spec], ref, outcome.sequence, outcome.result)
            bar.update(outcome.job.frames)
    return failed


def _setting(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    try:
        return name, float(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected NAME=NUMBER such as window_influence=0.4, got {text!r}") from None


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, got {text!r}")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m evaluation.ope", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("models", nargs="*", metavar="MODEL", help="shipped model or bundle folder; NAME=MODEL renames")
    parser.add_argument("--peers", nargs="*", default=[], metavar="NAME", help=f"of {', '.join(PEERS)}")
    parser.add_argument("--sequences", type=Path, required=True, metavar="DIR", help="the data set's folder")
    parser.add_argument(
        "--layout", default="auto", choices=("auto", *LAYOUTS), help="of that folder (default: what it looks like)"
    )
    parser.add_argument("--names", nargs="*", default=[], help="only these sequences; @FILE for a list in a file")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for results")
    parser.add_argument(
        "--rerun", action="store_true", help="delete results of another model or other data, and make them anew"
    )
    parser.add_argument("--processes", type=_count, default=1, help="sequences at once (default 1)")
    parser.add_argument(
        "--cluster",
        metavar="ADDRESS",
        help=f"on Ray: ray://HOST:PORT, HOST:PORT, auto, or {LOCAL_CLUSTER} for a cluster of --processes cores here",
    )
    parser.add_argument("--backend", choices=BACKENDS, default=BACKENDS[0], help="what runs the graphs")
    parser.add_argument(
        "--precision",
        choices=PRECISION_CHOICES,
        default="",
        help="what they compute in (default: the bundle's own; on a GPU what the backend is fastest in)",
    )
    parser.add_argument("--threads", type=_count, default=1, help="CPU threads a process (default 1)")
    parser.add_argument(
        "--set",
        dest="tracking",
        nargs="*",
        default=[],
        type=_setting,
        metavar="NAME=VALUE",
        help="tracking parameters in place of the model's own",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
