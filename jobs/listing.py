"""saltern methods, saltern models: what there is to choose from."""

import typer


def methods() -> None:
    """List the saliency methods with their options and defaults."""
    from saltern.pipeline.methods import available

    for name, kind in available().items():
        options = ", ".join(f"{key}={value}" for key, value in kind.defaults().items())
        typer.echo(f"{name:<16}{kind.summary()}" + (f" [-O {options}]" if options else ""))
    typer.echo(
        "package.module:Class runs a method of your own, captum:NAME any attribution of captum (extra `captum`)."
    )


def models() -> None:
    """List the models that are known by name."""
    from saltern.pipeline.models.classifiers import available_models

    for name in available_models():
        typer.echo(name)
    typer.echo("timm:NAME any model of timm (extra `timm`); package.module:factory a model of your own.")
