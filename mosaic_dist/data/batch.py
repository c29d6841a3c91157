"""What a step of training or validation is given, on the device that it runs on."""

from typing import NamedTuple

import numpy as np
import torch

from mosaic_dist.data.answer import AnswerLoss
from mosaic_dist.targets import IGNORE_INDEX

FILLER = -1  # the sample number of a row that only fills up a batch


class Batch(NamedTuple):
    """One rank's share of a step: int64 [B, T] on the device of the rank, and the B sample numbers.

    Targets that are not scored (the prompts of a dataset with an `answer_loss`, fillers) are IGNORE_INDEX. With
    `data.document_mask`, `documents_BT` counts the documents of each row from 0, as `document_numbers` does.
    """

    inputs_BT: torch.Tensor
    targets_BT: torch.Tensor
    sample_ids: list[int]
    documents_BT: torch.Tensor | None = None


def make_batch(
    samples: np.ndarray, tokens_BT: np.ndarray, answer_loss: AnswerLoss | None, document_end: int | None
) -> Batch:
    """A batch of rows [B, T + 1] and their numbers, on the CPU."""
    tokens = torch.from_numpy(tokens_BT.astype(np.int64))
    inputs_BT, targets_BT = tokens[:, :-1].clone(), tokens[:, 1:].clone()  # one row would share its memory
    targets_BT[torch.from_numpy(samples == FILLER)] = IGNORE_INDEX
    if answer_loss is not None:
        targets_BT[torch.from_numpy(answer_loss.unscored(tokens_BT))] = IGNORE_INDEX
    documents_BT = None if document_end is None else document_numbers(inputs_BT, document_end)
    return Batch(inputs_BT, targets_BT, samples.tolist(), documents_BT)


def document_numbers(inputs_BT: torch.Tensor, document_end: int) -> torch.Tensor:
    """int64 [B, T]: the documents that ended before each token in its row. An end belongs to the document it ends."""
    ends_BT = (inputs_BT == document_end).long()
    return ends_BT.cumsum(1) - ends_BT


class DeviceCopy:
    """Copies batches to a device beside what is computed there; on a CPU it hands them on as they are."""

    def __init__(self, device: torch.device | None):
        self.device = device
        self.stream = torch.cuda.Stream(device) if device is not None and device.type == "cuda" else None

    def send(self, batch: Batch) -> Batch:
        """Bring a batch to the device, and wait until it is there. For the thread that reads ahead."""
        if self.stream is None:
            return batch
        with torch.cuda.device(self.device), torch.cuda.stream(self.stream):  # a thread's own device is the first one
            pinned = [None if tensor is None else tensor.pin_memory() for tensor in _tensors(batch)]
            sent = [None if tensor is None else tensor.to(self.device, non_blocking=True) for tensor in pinned]
            self.stream.synchronize()
        inputs_BT, targets_BT, documents_BT = sent
        assert inputs_BT is not None
        assert targets_BT is not None
        return Batch(inputs_BT, targets_BT, batch.sample_ids, documents_BT)

    def receive(self, batch: Batch) -> Batch:
        """Tell that the caller's stream uses the batch: else its memory could be given to the next one too early."""
        if self.stream is not None:
            stream = torch.cuda.current_stream(self.device)
            for tensor in _tensors(batch):
                if tensor is not None:
                    tensor.record_stream(stream)
        return batch


def _tensors(batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    return batch.inputs_BT, batch.targets_BT, batch.documents_BT
