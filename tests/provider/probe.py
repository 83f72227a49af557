"""A module that tests load into Synapse, to call and to see what has no endpoint of its own.

`POST /_test/delete?path=…` calls the provider's `delete`, `GET /_test/temporary` tells how many
temporary files the provider remembers, and a file that holds the text `spam` of the module's
configuration is rejected. Only Synapse imports this.
"""

from __future__ import annotations

import gc
from typing import Any

from synapse.http.server import DirectServeJsonResource
from synapse.http.site import SynapseRequest
from synapse.media._base import FileInfo
from synapse.media.media_storage import ReadableFileWrapper
from synapse.module_api import NOT_SPAM, ModuleApi
from synapse.module_api.errors import Codes


class Probe:
    def __init__(self, config: Any, api: ModuleApi) -> None:
        self._spam: bytes = config["spam"].encode()
        api.register_spam_checker_callbacks(check_media_file_for_spam=self._check)
        api.register_web_resource("/_test/delete", _Delete(api))
        api.register_web_resource("/_test/temporary", _Temporary(api))

    async def _check(self, file: ReadableFileWrapper, _info: FileInfo) -> Any:
        content: list[bytes] = []
        await file.write_chunks_to(content.append)
        return (Codes.FORBIDDEN, {}) if self._spam in b"".join(content) else NOT_SPAM


def _provider(api: ModuleApi) -> Any:
    storage: Any = api._hs.get_media_repository().media_storage
    return storage.storage_providers[0].backend


class _Delete(DirectServeJsonResource):
    def __init__(self, api: ModuleApi) -> None:
        super().__init__(clock=api._hs.get_clock())
        self._module_api = api

    async def _async_render_POST(self, request: SynapseRequest) -> tuple[int, Any]:
        path = request.args[b"path"][0].decode()
        await _provider(self._module_api).delete(path, FileInfo(server_name=None, file_id="ignored"))
        return 200, {}


class _Temporary(DirectServeJsonResource):
    def __init__(self, api: ModuleApi) -> None:
        super().__init__(clock=api._hs.get_clock())
        self._module_api = api

    async def _async_render_GET(self, request: SynapseRequest) -> tuple[int, Any]:
        gc.collect()
        return 200, {"count": len(_provider(self._module_api)._files._temporary)}
