from .sklearn_sets import breast_cancer as breast_cancer
from .sklearn_sets import diabetes as diabetes
from .sklearn_sets import digits as digits
from .source import DataNotInstalled as DataNotInstalled
from .source import Dataset as Dataset
