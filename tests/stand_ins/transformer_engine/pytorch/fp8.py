"""Names that Megatron imports; FP8 is refused by this package."""


class FP8GlobalStateManager:
    @classmethod
    def is_fp8_enabled(cls) -> bool:
        return False


def fp8_autocast(*args: object, **kwargs: object) -> None:
    raise NotImplementedError


fp8_model_init = fp8_autocast
