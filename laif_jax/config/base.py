"""What all schemas share: frozen, strict about unknown keys, and about options that would have no effect."""

from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


class Spec(BaseModel):
    """Base of all schemas: frozen, strict about unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def unused(self) -> dict[str, tuple[str, str]]:
        """Options without effect under the others: option -> (the choice that makes it so, what would use it)."""
        return {}

    @model_validator(mode="after")
    def _refuse_unused(self) -> Self:
        for option, (choice, user) in self.unused().items():
            if option in self.model_fields_set:
                raise ValueError(
                    f"`{option}` has no effect with {choice}; it is used by {user}. Remove it, or change the method."
                )
        return self

    def resolved(self) -> dict[str, Any]:
        """All values, defaults included, as plain JSON; options without effect are left out."""
        unused = self.unused()
        return {name: _plain(getattr(self, name)) for name in type(self).model_fields if name not in unused}


def _plain(value: Any) -> Any:
    if isinstance(value, Spec):
        return value.resolved()
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple | list) else value
