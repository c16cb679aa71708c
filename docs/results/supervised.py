"""The reference of docs/results.md that sees labels: a backbone and a linear classifier.

    PYTHONPATH=. python docs/results/supervised.py --data imagenette160 --epochs 20 --keep-every 1
"""
import argparse
import functools

import torch
from torch import nn
from torchvision.transforms import RandomResizedCrop

import common
import training

RECIPES = {
    "imagenet": dict(arch="tiny_convnet", size=64, epochs=20, batch_size=128, base_lr=0.1,
                     final_lr=0.0, weight_decay=5e-4, warmup_epochs=1),
}


class Supervised(nn.Module):
    def __init__(self, backbone, num_classes):
        super().__init__()
        self.backbone = backbone
        self.probe = nn.Linear(backbone.dim, num_classes)

    def forward(self, x):
        return self.probe(self.backbone(x)[1])


def sample_view(image, size):
    box = RandomResizedCrop.get_params(image, (0.2, 1.0), ratio=(3 / 4, 4 / 3))
    return [(box, torch.rand(()).item() < 0.5, size)]


def train(args):
    device = training.set_up(args.seed)
    data = common.open_data(args.data, "train", args.size)
    model = Supervised(training.build_backbone(args), len(data.classes))
    model, ddp = training.distribute(model, device)
    optimizer = torch.optim.SGD(model.parameters(), momentum=0.9, weight_decay=args.weight_decay)
    run = training.Run(args, model, optimizer, data, device)

    colours = common.Photometric(jitter=(0.4, 0.4, 0.2, 0.1), size=args.size)
    for batch in run.batches(functools.partial(sample_view, size=args.size)):
        x = colours(batch.views[0])

        with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
            logits = ddp(x)
        loss, accuracy = training.probe(logits, batch.labels)

        lr = run.set_lr()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

        run.log(loss=loss, **accuracy, lr=lr)
        run.end_step()

    run.finish("knn")


if __name__ == "__main__":
    training.launch(train, argparse.ArgumentParser(description=__doc__), RECIPES)
