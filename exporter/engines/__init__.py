"""TensorRT engines of guarded models: profiles, the build, the look into what was built, the folder."""
