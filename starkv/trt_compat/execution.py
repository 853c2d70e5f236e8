# SPDX-License-Identifier: Apache-2.0
"""Running a plan: what TensorRT would answer with garbage or a crash is refused before it sees it."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from starkv.errors import EngineError
from starkv.trt_compat.running import ALIGNMENT, Plan, Shape, TensorInfo

if TYPE_CHECKING:
    import tensorrt as trt


class Execution:
    """A plan in one profile: every tensor's address and shape is checked before TensorRT sees it.

    Args:
        plan: opened.
        profile: index.
        scratch: address of device memory for activations, at least :meth:`Plan.scratch_bytes`.
        scratch_bytes: what is there.
        stream: on which everything runs.
        aliases: output → input whose memory it shares.
    """

    def __init__(
        self,
        plan: Plan,
        profile: int,
        scratch: int,
        scratch_bytes: int,
        stream: int,
        aliases: Mapping[str, str] | None = None,
    ) -> None:
        self._plan, self._profile, self._stream = plan, profile, stream
        self._scratch = scratch, scratch_bytes
        self._aliases = dict(aliases or {})
        plan.check_aliases(self._aliases)
        self.renew()

    def renew(self) -> None:
        """Begin anew, without anything that was bound, or is listening; earlier runs must be done.

        Raises:
            EngineError: TensorRT can't.
        """
        self._context = self._plan.context(self._profile, self._stream)
        self._context.set_device_memory(*self._scratch)
        self._addresses: dict[str, int] = {}
        self._shapes: dict[str, Shape] = {}
        self._outputs: dict[str, Shape] = {}
        self._checked = False

    @property
    def context(self) -> "trt.IExecutionContext":
        return self._context

    @property
    def plan(self) -> Plan:
        return self._plan

    def bind(self, name: str, address: int, shape: Shape | None = None) -> None:
        """Say where a tensor lies and how large it is.

        Args:
            name: of an input or output.
            address: on the device, a multiple of :data:`ALIGNMENT`.
            shape: of an input; of an output the shape that there is room for, which :meth:`enqueue` compares
                with what TensorRT will write.

        Raises:
            EngineError: the plan has no such tensor, or its profile no such shape.
        """
        info = self._plan.tensors.get(name)
        if info is None:
            raise EngineError(f"{self._plan.name} has no tensor {name}; build the engine again")
        if not address or address % ALIGNMENT:
            raise EngineError(f"{self._plan.name}: {name} lies at {address:#x}, no multiple of {ALIGNMENT}")
        if info.is_input:
            self._set_shape(info, shape or ())
        elif shape is not None and self._outputs.get(name) != shape:
            self._outputs[name], self._checked = shape, False
        if not self._context.set_tensor_address(name, address):
            raise EngineError(f"{self._plan.name}: TensorRT refuses the address of {name}: {self._said()}")
        self._addresses[name] = address

    def _set_shape(self, info: TensorInfo, shape: Shape) -> None:
        if self._shapes.get(info.name) == shape:
            return
        least, _, most = info.ranges[self._profile]
        fits = len(shape) == len(least) and all(
            low <= size <= high for low, size, high in zip(least, shape, most, strict=True)
        )
        if not fits:
            raise EngineError(
                f"{self._plan.name}: {info.name} is {list(shape)}, but the engine was built for "
                f"{list(least)} to {list(most)}; build it for larger sizes, or use smaller ones"
            )
        if not self._context.set_input_shape(info.name, shape):
            raise EngineError(
                f"{self._plan.name}: TensorRT refuses {info.name} {list(shape)}: {self._said()}"
            )
        self._shapes[info.name], self._checked = shape, False

    def enqueue(self) -> None:
        """Enqueue one run.

        Raises:
            EngineError: a tensor has no address, shapes contradict each other, an output is larger than its
                memory, aliases lie apart, or TensorRT can't.
        """
        missing = [name for name in self._plan.tensors if name not in self._addresses]
        if missing:
            raise EngineError(f"{self._plan.name}: {missing[0]} has no address")
        for output, source in self._aliases.items():
            if self._addresses[output] != self._addresses[source]:
                raise EngineError(f"{self._plan.name}: {output} must lie where {source} does")
        if not self._checked:
            self._check_shapes()
        if not self._context.execute_async_v3(self._stream):
            raise EngineError(f"TensorRT can't run {self._plan.name}: {self._said()}")

    def _check_shapes(self) -> None:
        try:
            missing = self._context.infer_shapes()
        except RuntimeError:
            raise EngineError(
                f"{self._plan.name}: the inputs' shapes contradict each other: {self._said()}"
            ) from None
        if missing:
            raise EngineError(f"{self._plan.name}: {missing[0]} has no shape")
        for name, room in self._outputs.items():
            shape = tuple(self._context.get_tensor_shape(name))
            fits = len(shape) == len(room) and all(
                size in (expected, -1) for size, expected in zip(shape, room, strict=True)
            )
            if not fits:
                raise EngineError(
                    f"{self._plan.name}: {name} will be {list(shape)}, but there is room for {list(room)}; "
                    "build the engine again"
                )
        self._checked = True

    def _said(self) -> str:
        return self._plan.runtime.log.take()
