"""Random faults in a swarm of real servers, schedule after schedule, until one goes wrong.

    python scripts/faults.py                          # schedules 0 to 99
    python scripts/faults.py --seed 4711 --count 1    # that one again
    python scripts/faults.py --kinds kill,stop        # of `tests/swarm/faults.py`
    python scripts/faults.py --training               # training steps in place of answers

Each schedule is a way of writing (greedy, sampled, beams, guesses, steps by hand) and up to four things that happen to servers meanwhile;
what comes out is compared with what the model writes on this machine alone. With `--training` it is three training steps, of whose
gradients (of prompts, LoRA parameters and embeddings) the same holds. Everything follows from the seed, except how quick the machine is.
Prints one line a schedule; ends with status 1 and the seed at the first that is wrong or hangs.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import tempfile
import time
import traceback
from contextlib import ExitStack
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ["OMP_NUM_THREADS"] = "1"


def main() -> int:
    from tests.swarm.faults import KINDS, faulty_swarm, random_case
    from tests.swarm.models import SPANS, connected, load_local, save_model
    from tests.swarm.training import PROJECTIONS, load_sides
    from tests.swarm.training_faults import TUNING, random_training

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="of the first schedule")
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--kinds", default=",".join(KINDS), help="what may happen  [default: %(default)s]")
    parser.add_argument("--family", default="llama", choices=sorted(SPANS))
    parser.add_argument("--replicas", type=int, default=2, help="servers of each span")
    parser.add_argument("--training", action="store_true", help="training steps in place of answers")
    parser.add_argument("--verbose", action="store_true", help="the log of the client")
    parser.add_argument("--keep-going", action="store_true", help="after one that went wrong, too")
    options = parser.parse_args()
    if options.verbose:
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    kinds = tuple(options.kinds.split(","))
    if wrong := set(kinds) - set(KINDS):
        parser.error(f"no such kind: {', '.join(sorted(wrong))}; there are {', '.join(KINDS)}")
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # the servers end with this program
    failed: list[int] = []
    with tempfile.TemporaryDirectory(prefix="petalnet-faults-") as folder:
        path = save_model(options.family, Path(folder) / "model")
        began = time.monotonic()
        with ExitStack() as open_now:
            swarm = open_now.enter_context(faulty_swarm(Path(folder), path, SPANS[options.family], options.replicas))
            if options.training:
                remote = open_now.enter_context(connected(path, swarm.peers, **TUNING))
                sides = load_sides(path, remote, prompts=True, deep=True, lora=PROJECTIONS[options.family], embeddings=True)
            else:
                local = load_local(path)
            for seed in range(options.seed, options.seed + options.count):
                case = random_training(swarm, seed, kinds) if options.training else random_case(swarm, seed, kinds)
                try:
                    case.run(sides if options.training else local)
                    print(f"seed {seed}: {case}; {case.outcome}", flush=True)
                except Exception:  # whatever it is, the line below says how to see it again
                    traceback.print_exc()
                    print(f"seed {seed}: FAILED; {case}; {case.outcome}", flush=True)
                    kept = "" if options.kinds == ",".join(KINDS) else f" --kinds {options.kinds}"
                    kept += " --training" if options.training else ""
                    print(f"again: python scripts/faults.py --family {options.family} --seed {seed} --count 1{kept}", flush=True)
                    failed.append(seed)
                    if not options.keep_going:
                        break
                finally:
                    swarm.heal()
    print(f"{len(failed)} of the schedules failed{': ' + str(failed) if failed else ''}; {time.monotonic() - began:.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
