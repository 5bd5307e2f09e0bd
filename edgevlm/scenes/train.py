"""Trains the scenes reference model in two stages, each resumable and bounded by a time budget.

stage 1, vision   The vision encoder alone, on dense targets: what each patch shows, whose box it
                  belongs to, which character of a sign, and the picture's facts from the class
                  token. Two thirds of the pictures are full of signs, for practice in reading.
                  Writes vision.safetensors.
stage 2, packed   The whole model, from the encoder of stage 1, or from an earlier stage 2 folder or
                  its exported checkpoint with a new warm-up and decay. Many questions share one
                  picture in a packed sequence; a fifth of the steps show pictures in pairs.
                  --freeze-vision trains the projector and the decoder only, a third faster.
                  Writes packed.safetensors, and with --export a bfloat16 checkpoint that stock
                  transformers loads.

The shipped checkpoint was made on two shared CPU cores with

  export OMP_WAIT_POLICY=passive MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=20000000000
  python -m edgevlm.scenes.train vision --folder train/vision --hours 0.3 --seed 7
  python -m edgevlm.scenes.train vision --start train/vision --folder train/vision2 \\
      --hours 0.15 --seed 8
  python -m edgevlm.scenes.train packed --start train/vision2 --folder train/packed \\
      --export train/scenes-vlm --hours 1.1 --seed 7 --freeze-vision --compile
  python -m edgevlm.scenes.train packed --start train/scenes-vlm --folder train/packed2 \\
      --hours 0.45 --seed 11 --rate 0.6 --freeze-vision --compile --practice relation
  python -m edgevlm.scenes.train packed --start train/packed2 --folder train/packed3 \\
      --export train/scenes-vlm --hours 0.95 --seed 12 --rate 0.6 --freeze-vision --compile

The first run had no practice signs; the third asked every task equally often and showed pairs half
as often. Without practice `relation` was still at chance after its 18,000 pictures; 5,500 with
practice taught it.

The three variables keep waiting threads from spinning and freed memory in the process: they are
worth a third of the speed on a CPU. The learning rate follows the time spent training, so a slow
machine sees fewer pictures but still ends with its decay done. With --resume a stopped run goes on
where its last state was written.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from edgevlm.scenes.words import TASKS


def main(arguments: list[str] | None = None) -> None:
    """Run one stage of training."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.stage == "packed" and options.start is None:
        parser.error("packed needs --start, the folder of stage 1 or of an earlier stage 2")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")

    import torch

    from edgevlm.scenes.loop import Budget, run_stage

    host = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if options.stage == "vision":
        from edgevlm.scenes.vision_stage import VisionStage

        budget = Budget(folder=options.folder, hours=options.hours, num_threads=options.threads)
        run_stage(VisionStage(options.seed, host, options.start), budget, resume=options.resume)
        return
    from edgevlm.scenes.packed_stage import PackedStage

    stage = PackedStage(options.seed, host, options.start, options.export, options.practice)
    if options.freeze_vision:
        stage.freeze_vision()
    elif not stage.has_heads:
        parser.error(f"{options.start} is a checkpoint, without dense heads: use --freeze-vision")
    if options.compile:
        stage.compile()
    budget = Budget(
        folder=options.folder,
        hours=options.hours,
        muon_rate=2e-3 * options.rate,
        adam_rate=1.5e-3 * options.rate,
        vision_share=0.5,
        num_threads=options.threads,
    )
    run_stage(stage, budget, resume=options.resume)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m edgevlm.scenes.train",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("stage", choices=("vision", "packed"))
    parser.add_argument("--folder", type=Path, required=True, help="where the state is kept")
    parser.add_argument("--hours", type=float, required=True, help="time to train, decay included")
    parser.add_argument("--seed", type=int, default=7, help="weights and pictures (default 7)")
    parser.add_argument("--resume", action="store_true", help="go on from the folder's state")
    parser.add_argument("--start", type=Path, help="folder to take weights from")
    parser.add_argument("--export", type=Path, help="packed: checkpoint folder, kept up to date")
    parser.add_argument("--threads", type=int, help="threads (default: one or all, by trial)")
    parser.add_argument("--rate", type=float, default=1.0, help="packed: learning rate factor")
    parser.add_argument(
        "--freeze-vision", action="store_true", help="packed: train projector and decoder only"
    )
    parser.add_argument(
        "--practice", nargs="+", default=(), choices=TASKS, help="packed: tasks to ask more often"
    )
    parser.add_argument("--compile", action="store_true", help="packed: use torch.compile")
    return parser


if __name__ == "__main__":
    main()
