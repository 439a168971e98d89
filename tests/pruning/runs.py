"""Runs to prune in, and what is expected of them."""

import lightning as L
import torch
from torch import nn

from tests.support import Classifier, small_data, small_network


def expected(module, sparsity):
    return {n: round(sparsity * p.numel()) for n, p in module.named_parameters() if p.ndim > 1}


class Watch(L.Callback):
    """Checks after every optimizer step that what is pruned is zero, and records the counts."""

    def __init__(self, prune):
        self.prune = prune
        self.history = []

    def on_train_batch_end(self, trainer, pl_module, *_):
        parameters = dict(pl_module.named_parameters())
        for name, mask in self.prune.masks.items():
            bits = parameters[name][~mask].view(
                torch.int16 if parameters[name].element_size() == 2 else torch.int32
            )
            assert not bits.any(), "a pruned weight is not +0.0"
        self.history.append(sum(int((~m).sum()) for m in self.prune.masks.values()))


def run(make_trainer, prune, module=None, data=None, callbacks=(), epochs=3, **arguments):
    module = module or Classifier()
    watch = Watch(prune)
    trainer = make_trainer(max_epochs=epochs, callbacks=[prune, watch, *callbacks], **arguments)
    trainer.fit(module, small_data() if data is None else data, small_data(8))
    return module, watch, trainer


class LearningRate(Classifier):
    def __init__(self):
        super().__init__()
        self.lr = 0.01

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)


class Manual(Classifier):
    """Two optimizers; one steps twice as often, without Lightning's wrapper."""

    def __init__(self):
        super().__init__(small_network(norm=False))
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        features, head, *_ = self.optimizers()
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        features.zero_grad()
        head.zero_grad()
        self.manual_backward(loss)
        if batch_idx % 2:
            features.step()
        head.optimizer.step()

    def configure_optimizers(self):
        return (
            torch.optim.Adam(self.network[:4].parameters(), weight_decay=0.1),
            torch.optim.SGD(self.network[4:].parameters(), lr=0.1, momentum=0.9),
        )
