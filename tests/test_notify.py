"""Notifications to the kernel, whatever it says of them."""

import errno
import os

import pytest

from csvfs.mount.notify import KernelNotifier


class Kernel:
    def __init__(self, monkeypatch: pytest.MonkeyPatch, error: int) -> None:
        self.messages: list[bytes] = []
        self.error = error
        self.notifier = KernelNotifier(0)
        monkeypatch.setattr(os, "write", self.write)

    def write(self, _fd: int, message: bytes) -> int:
        self.messages.append(message)
        if self.error:
            raise OSError(self.error, os.strerror(self.error))
        return len(message)


@pytest.mark.parametrize("error", [errno.EINVAL, errno.EPERM, errno.EOPNOTSUPP])
def test_a_kernel_without_an_epoch_is_asked_once_and_left_in_peace(
    monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    kernel = Kernel(monkeypatch, error)
    for _ in range(3):
        kernel.notifier.increment_epoch()
    assert len(kernel.messages) == 1


@pytest.mark.parametrize("error", [0, errno.ENODEV, errno.ENOTCONN])
def test_an_epoch_that_is_there_is_incremented_each_time(monkeypatch: pytest.MonkeyPatch, error: int) -> None:
    kernel = Kernel(monkeypatch, error)
    for _ in range(3):
        kernel.notifier.increment_epoch()
    assert len(kernel.messages) == 3


def test_an_epoch_that_is_there_but_cannot_be_incremented_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kernel = Kernel(monkeypatch, errno.ENOMEM)
    with pytest.raises(OSError, match="memory"):
        kernel.notifier.increment_epoch()


def test_attributes_that_cannot_be_taken_back_are_an_error_unless_the_inode_is_not_known(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kernel = Kernel(monkeypatch, errno.ENOENT)
    kernel.notifier.invalidate_attr(5)
    kernel.error = errno.EINVAL
    with pytest.raises(OSError, match="Invalid"):
        kernel.notifier.invalidate_attr(5)


@pytest.mark.parametrize("error", [errno.EINVAL, errno.EPERM, errno.EOPNOTSUPP])
async def test_a_kernel_that_cannot_be_asked_to_forget_is_asked_once_and_left_in_peace(
    monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    kernel = Kernel(monkeypatch, error)
    for _ in range(3):
        await kernel.notifier.prune([1, 2, 3])
    assert len(kernel.messages) == 1


async def test_inodes_to_forget_are_told_in_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel(monkeypatch, 0)
    await kernel.notifier.prune([7, 1 << 40])
    (message,) = kernel.messages
    assert len(message) == int.from_bytes(message[:4], "little") == 48
    assert message[32:] == (7).to_bytes(8, "little") + (1 << 40).to_bytes(8, "little")
