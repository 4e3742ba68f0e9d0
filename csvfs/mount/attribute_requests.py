"""Extended attributes, as the kernel asks for them.

Place      mount floor; a part of channel.py. pyfuse3 does GETXATTR and LISTXATTR, where they cannot be answered here, and
           REMOVEXATTR.
"""

import errno
from typing import Protocol

from csvfs.mount import fuse_abi as abi
from csvfs.mount.answers import Answers, Handler
from csvfs.mount.file_state import XATTRS


class Attributes(Protocol):
    """Of the file table."""

    def getattr_nowait(self, ino: int) -> list[int] | None: ...


class Setter(Protocol):
    """Of the operations."""

    async def set_attribute(
        self, ino: int, name: bytes, value: bytes, flags: int, drops_set_gid: bool = False
    ) -> None: ...


class Agreed(Protocol):
    """Of the relay."""

    flags: int


class AttributeRequests:
    def __init__(self, answers: Answers, files: Attributes, names: Setter, agreed: Agreed) -> None:
        self._answers = answers
        self._files = files
        self._names = names
        self._agreed = agreed

    def handlers(self) -> dict[int, Handler]:
        return {abi.SETXATTR: self._on_set, abi.GETXATTR: self._on_get, abi.LISTXATTR: self._on_list}

    def _on_set(self, unique: int, node: int, body: memoryview) -> None:
        # pyfuse3 makes XATTR_CREATE and XATTR_REPLACE of two calls, which another node may come between.
        head = abi.SETXATTR_EXT_IN if self._agreed.flags & abi.FLAG_SETXATTR_EXT else abi.SETXATTR_IN
        size, flags, *further = head.unpack_from(body)
        drops_set_gid = bool(further and further[0] & abi.SETXATTR_ACL_KILL_SGID)
        name, separator, rest = bytes(body[head.size :]).partition(b"\0")
        if not separator or not name or len(rest) < size:
            self._answers.errno(unique, errno.EINVAL)
            return
        set_attribute = self._names.set_attribute
        self._answers.start(unique, self._answers.then_ok, set_attribute, node, name, rest[:size], flags, drops_set_gid)

    def _on_get(self, unique: int, node: int, body: memoryview) -> None:
        name = bytes(body[abi.GETXATTR_IN.size :]).partition(b"\0")[0]
        # Of security.capability the kernel asks before every buffered write, whether there is one to remove: there never is.
        if name == b"security.capability" or self._has_none(node):
            self._answers.errno(unique, errno.ENODATA)
        else:
            self._answers.forward(abi.GETXATTR, unique, node, body)

    def _on_list(self, unique: int, node: int, body: memoryview) -> None:
        if self._has_none(node):
            self._answers.reply(unique, (abi.pack_no_names_reply(unique, abi.GETXATTR_IN.unpack_from(body)[0]),))
        else:
            self._answers.forward(abi.LISTXATTR, unique, node, body)

    def _has_none(self, node: int) -> bool:
        """Known under the lease: the kernel asks for an ACL of every inode that somebody else than its owner uses. That
        there is none it remembers until its attributes are taken back, as a recall does before somebody sets one."""
        attr = self._files.getattr_nowait(node)
        return attr is not None and attr[XATTRS] == 0
