"""Every error that a person can meet; each message names the place, what was found and the cure."""


class P2DError(Exception):
    """Root of all errors that P2D raises on purpose."""


class InputError(P2DError):
    """What the user gave is wrong; nothing was started (exit code 2)."""


class SettingsError(InputError):
    """A setting is unknown, of the wrong type, or outside its bounds."""


class DataError(InputError):
    """A data file cannot be read as samples; the message names file and line or row."""


class ModelError(InputError):
    """A model folder cannot be used: config or weights are missing, or not safe to load."""


class UnsupportedModelError(ModelError):
    """The model's attention has a structure in which single heads cannot be found."""


class HeadMapError(InputError):
    """A head map does not fit the model, or its heads cannot be."""


class UnknownNameError(InputError):
    """A plug-in of that name is not registered; the message lists the known ones."""


class ExportError(InputError):
    """A model cannot be exported in the form that was asked for; the message names another."""


class ArtifactError(P2DError):
    """An artifact is missing or is not what its manifest says."""


class StorageError(P2DError):
    """The disk is full or too small for what comes, or a folder may not be written."""


class ServiceError(P2DError):
    """A server or a database that the run needs is away, locked, or refuses."""


class TrainingError(P2DError):
    """Training cannot go on: the loss is not a number, or nothing is left to learn from."""


class EvaluationError(P2DError):
    """A benchmark could not be run on a model; what was finished is kept."""


class ProcessError(P2DError):
    """Of the processes that work on a stage together another one failed."""


class NumericalError(P2DError):
    """What a model or a scorer gave is not a number."""


class TransientError(P2DError):
    """Something that may pass by itself; of ours this and its kinds alone are retried."""


class DeviceMemoryError(TransientError):
    """Not even the least part of the work fits in the device's memory as others leave it now."""
