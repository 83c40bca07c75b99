# Triton with what the front model of `vlmguard package --triton` needs. The repository is not in the image: mount it, read-only.
# A tag that your GPUs' driver supports: https://docs.nvidia.com/deeplearning/triton-inference-server/release-notes/
FROM nvcr.io/nvidia/tritonserver:25.08-py3
RUN pip install --no-cache-dir "vlmguard==0.1.0"
USER 1000
EXPOSE 8000 8001 8002
CMD ["tritonserver", "--model-repository=/models/repository", "--disable-auto-complete-config"]
