"""The library's pieces in a training loop of one's own."""

import torch

from nostalgia import CurvatureMemory, GradientProjector, HessianOperator, lanczos

model, loss = torch.nn.Linear(8, 3), torch.nn.CrossEntropyLoss(reduction="sum")
batches = [(torch.randn(16, 8), torch.randint(0, 3, (16,))) for _ in range(4)]  # this rank's share
hessian = HessianOperator(model, lambda m, b: (loss(m(b[0]), b[1]), len(b[1])), batches)
memory = CurvatureMemory(k=4)
memory.update(lanczos(hessian, k=4, tol=1e-3))  # after a task
projector = GradientProjector(memory, dict(model.named_parameters()))
optimizer = torch.optim.AdamW(model.parameters())
loss(model(batches[0][0]), batches[0][1]).backward()  # while training the next one
projector.project_gradients()
projector.constrain_step(optimizer)
print(projector.leak())
