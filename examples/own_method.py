"""Methods of one's own: a regulariser adds to the gradients, a replay method changes the loss."""

from dataclasses import dataclass

from nostalgia.methods import Method, option, placed_as


@dataclass(frozen=True)
class Options:
    strength: float = option(0.1, "Of the pull to where the task began.", low=0)


class Pulling(Method):
    """strength/2 |theta - theta_start|^2."""

    name = "pulling"
    Config = Options

    def begin_task(self, task):
        self.start = {name: p.detach().clone() for name, p in task.parameters.items()}

    def gradients(self):
        for name, p in self.task.parameters.items():
            p.grad.add_(p.detach() - placed_as(self.start[name], p), alpha=self.config.strength)

    def state_dict(self):
        return {"start": self.start}

    def load_state_dict(self, state):
        self.start = state["start"]


class Replaying(Method):
    """Each new image has one of the first 20 images of an earlier task beside it."""

    name = "replaying"
    trains_heads = True

    def __init__(self, config, seed=0):
        super().__init__(config, seed)
        self.stored = []

    @property
    def all_heads(self):
        return bool(self.stored)

    def begin_task(self, task):
        self.exemplars = task.loader(self.stored) if self.stored else None

    def loss(self, model, batch):
        if self.exemplars is None:
            return super().loss(model, batch)
        return self.task.objective(model, batch.followed_by(self.exemplars.paired(batch)))

    def end_task(self, task):
        self.stored += [(task.index, i) for i in range(20)]

    def bytes_remembered(self):
        return len(self.stored) * self.task.image_bytes

    def state_dict(self):
        return {"stored": self.stored}

    def load_state_dict(self, state):
        self.stored = [tuple(pair) for pair in state["stored"]]
