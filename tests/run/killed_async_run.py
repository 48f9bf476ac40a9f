"""As killed_run.py, with an engine that samples episodes on a thread beside the trainer, from a copy of the model.

What each step trains on is appended to RUN_DIR-steps.jsonl: its number, its groups, and the first prompts of the order.

python killed_async_run.py CONFIG RUN_DIR SEED KILLS
"""

import json
import queue
import sys
import threading
from pathlib import Path

import killed_run

from megatron_s2d.models.build import build_model
from megatron_s2d.rollout.buffer import RolloutBuffer
from megatron_s2d.rollout.megatron.engine import MegatronEngine
from megatron_s2d.stages.rollout_factory import RolloutFactory


class CopyEngine:
    """Samples with a copy of the weights, one group after the other on a thread; updates wait for the one that runs."""

    def __init__(self, model, tokenizer):
        self._chunks = build_model(model.spec, model.layout, seed=0)
        self._engine = MegatronEngine(self._chunks, model.spec.vocab_size, model.layout, tokenizer=tokenizer)
        self._waiting: queue.PriorityQueue = queue.PriorityQueue()
        self._changed, self._may_run, self._number = threading.Condition(), True, 0
        self._is_busy, self._error = False, None
        self._wanted: dict = {}  # name -> number of the call that started it, until it is taken or cancelled
        self._ended: dict = {}
        self._copy(model.chunks)
        threading.Thread(target=self._work, daemon=True).start()

    @property
    def version(self):
        return self._engine.version

    def generate(self, requests, progress=None):
        return self._engine.generate(requests, progress)

    def run(self, episodes):
        return self._engine.run(episodes)

    def start(self, episodes, priority=0):
        for name, episode in episodes.items():
            self._number += 1
            with self._changed:
                self._wanted[name] = self._number
            self._waiting.put((priority, self._number, name, episode))
        self._set_running(True)

    def wait(self, is_enough):
        self._set_running(True)
        with self._changed:
            self._changed.wait_for(lambda: self._error or is_enough(self._ended.keys()))
            if self._error:
                raise self._error
            ended, self._ended = self._ended, {}
            for name in ended:
                del self._wanted[name]
        return ended

    def cancel(self, names):
        with self._changed:
            for name in names:
                self._wanted.pop(name, None)
                self._ended.pop(name, None)

    def pause(self, *, interrupt):
        with self._changed:
            self._may_run = False
            self._changed.wait_for(lambda: not self._is_busy)

    def update_weights(self, chunks, version):
        self.pause(interrupt=False)
        self._copy(chunks)
        self._engine.update_weights(self._chunks, version)
        self._set_running(True)

    def _copy(self, chunks):
        for own, trained in zip(self._chunks, chunks, strict=True):
            own.load_state_dict({k: v for k, v in trained.state_dict().items() if v is not None}, strict=False)

    def measurements(self):
        return {}

    def metrics(self):
        return {}

    def sleep(self):
        pass

    def close(self):
        self.pause(interrupt=False)

    def _set_running(self, value):
        with self._changed:
            self._may_run = value
            self._changed.notify_all()

    def _work(self):
        while True:
            _, number, name, episode = self._waiting.get()
            with self._changed:
                self._changed.wait_for(lambda: self._may_run)
                if self._wanted.get(name) != number:
                    continue
                self._is_busy = True
            try:
                result, error = self._engine.run([episode])[0], None
            except BaseException as failure:
                result, error = None, failure
            with self._changed:
                self._is_busy, self._error = False, self._error or error
                if self._wanted.get(name) == number:
                    self._ended[name] = result
                self._changed.notify_all()


def engine(factory, model, model_name, params, *, longest_prompt=0):
    return CopyEngine(model, factory._inputs.tokenizer_of(model_name))


def recorded(next_batch, path: Path):
    def call(buffer, step):
        batch = next_batch(buffer, step)
        groups = list(dict.fromkeys(sample.group_id for sample in batch.samples))
        turns = max(sample.num_turns for sample in batch.samples)
        order = [prompt.id for prompt in buffer.loader.slice(0, buffer.steps * buffer.train_batch_size)]
        with path.open("a") as file:
            file.write(json.dumps({"step": step, "groups": groups, "turns": turns, "order": order}) + "\n")
        return batch

    return call


if __name__ == "__main__":
    run_dir = Path(sys.argv[2])
    run_dir.mkdir(parents=True, exist_ok=True)
    RolloutFactory.engine = engine
    RolloutBuffer.next_batch = recorded(RolloutBuffer.next_batch, run_dir.with_name(f"{run_dir.name}-steps.jsonl"))
    killed_run.MAX_OPERATIONS = 150  # of 690, and of some 80 from one checkpoint to the next
    killed_run.main(Path(sys.argv[1]), run_dir, int(sys.argv[3]), int(sys.argv[4]))
