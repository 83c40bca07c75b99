# Triton with what the front model of `vlmguard package --triton` needs. Build it at the top of a clone, as docs/serving.md says.
# The repository is not in the image: mount it, read-only.
# A tag that your GPUs' driver supports: https://docs.nvidia.com/deeplearning/triton-inference-server/release-notes/
FROM nvcr.io/nvidia/tritonserver:25.08-py3
COPY . /source
RUN pip install --no-cache-dir /source && rm -r /source
USER 1000
EXPOSE 8000 8001 8002
CMD ["tritonserver", "--model-repository=/models/repository", "--disable-auto-complete-config"]
