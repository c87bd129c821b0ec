"""`python -m pregate.train +experiment=NAME`: get a source, convert it, fine-tune it, hand it to evaluation."""

from __future__ import annotations

from pathlib import Path

from pregate.cli import entry_point, refuse_ignored
from pregate.config import Run

MODEL = "the model is model.source=DIR_OR_ID"
ADVICE = {
    "source": MODEL,
    "checkpoint": MODEL,
    "output": "the directory is run_dir=DIR",
    "plan": "only pregate.bench makes plans",
}


def main(run: Run) -> None:
    from pregate.engine.storage.pack import refuse_output
    from pregate.measure.evaluation import evaluate, prepare
    from pregate.measure.servable import check_engine, check_reference
    from pregate.models.checkpoint import read_config
    from pregate.system.process_group import join, leave, main_only, part
    from pregate.tasks.registry import build_training_task, splits_read
    from pregate.tasks.tokens import check_vocabulary, load_tokenizer
    from pregate.tracking import open_tracker
    from pregate.training import checks, stages
    from pregate.training.memory_needs import needs_of
    from pregate.training.offloaded import check_offloaded
    from pregate.training.run_dir_lock import CHECKPOINT, claimed_run_dir

    refuse_ignored(run, "train", ADVICE)
    state = join()
    checks.check_precision(run)
    refuse_output("run_dir", Path(run.run_dir))
    checks.check_model(run)
    trained = checks.trained_config(run)
    check_engine(run, *trained)
    check_offloaded(run, *trained)
    checks.check_memory_savers(run, trained[0])
    task, tokenizer = build_training_task(run), load_tokenizer(run)
    if run.model.source is not None:
        check_vocabulary(tokenizer, run.model.source, read_config(run.model.source, run.model.revision))
    checks.check_teachers(run, tokenizer)
    check_reference(run, run.reference if run.then_eval else None, trained[0].to_dict(), tokenizer)
    checks.check_inputs(run, tokenizer)
    task.check(tokenizer, splits_read(run))
    is_main = state.is_main_process
    with claimed_run_dir(run) as run_dir:
        if is_main and run.train.steps:
            assert state.device is not None
            print(needs_of(run, *checks.trained_config(run, tokenizer), state.device).line(state.device), flush=True)
        with open_tracker(run, run_dir, is_main) as tracker:
            source = stages.get_source(run, run_dir, task, tokenizer, tracker)
            converted = stages.get_converted(run, run_dir, source, task, tokenizer)
            tuned = stages.train_converted(run, run_dir, converted, task, tokenizer, tracker)
            leave()

            def hand_over() -> None:
                evaluation = None
                if run.then_eval:
                    reference = run.reference or (source if run.source_train is not None else None)
                    evaluation = evaluate(prepare(run, tuned.checkpoint, reference), run_dir, tracker)
                stages.finish(run, run_dir, source, tuned, evaluation)
                if run.tracking.log_checkpoint:
                    tracker.artifact(run_dir / CHECKPOINT)

            main_only(hand_over, "evaluating")
        part()
    if is_main:
        print(f"Run: {run_dir}")


if __name__ == "__main__":
    entry_point(main)
