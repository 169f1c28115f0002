//! One QEMU process as one typed machine.
