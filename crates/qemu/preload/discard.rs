//! Loaded into the QEMU of a clone, so that memory that its guest frees is free on the host.
//!
//! A clone maps a sealed file privately: a page is the file's until the guest writes it, then a
//! copy of its own. When the guest reports that a page is free, QEMU punches a hole in the file and
//! drops the copy (`ram_block_discard_range`). The file must stay as it is, so QEMU does neither.
//! Here the hole in a file that this process may only read is one that is there already, and QEMU
//! goes on to drop its copy. The page reads as the file's again, which suits a guest that takes the
//! content of a free page for anything; for one that takes it for zeros the switch stays off.
#![no_std]

use core::ffi::{CStr, c_char, c_int, c_long, c_uint};

/// The path of the memory file; opened to be read, whatever is asked for.
const MEMORY: &CStr = c"GODWIT_MEMORY";
/// The number of the descriptor whose first byte is 1 once copies may be dropped.
const SWITCH: &CStr = c"GODWIT_DISCARDS";

const O_ACCMODE: c_int = 3;
const O_RDONLY: c_int = 0;
const F_GETFL: c_int = 3;
const AT_FDCWD: c_int = -100;
/// `FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE`.
const PUNCH: c_int = 3;

#[cfg(target_arch = "x86_64")]
const CALLS: (c_long, c_long) = (257, 285);
#[cfg(target_arch = "aarch64")]
const CALLS: (c_long, c_long) = (56, 47);
const SYS_OPENAT: c_long = CALLS.0;
const SYS_FALLOCATE: c_long = CALLS.1;

#[link(name = "c")]
unsafe extern "C" {
    fn syscall(number: c_long, ...) -> c_long;
    fn getenv(name: *const c_char) -> *const c_char;
    fn strcmp(a: *const c_char, b: *const c_char) -> c_int;
    fn atoi(text: *const c_char) -> c_int;
    fn fcntl(fd: c_int, command: c_int, ...) -> c_int;
    fn pread64(fd: c_int, to: *mut u8, bytes: usize, at: i64) -> isize;
}

/// `open` of a program that is compiled for large files.
///
/// # Safety
/// As `open(2)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn open64(path: *const c_char, flags: c_int, mode: c_uint) -> c_int {
    // SAFETY: `path` is a C string by this function's own contract, the value of a variable is one.
    let flags = unsafe {
        let memory = getenv(MEMORY.as_ptr());
        match !memory.is_null() && strcmp(path, memory) == 0 {
            true => flags & !O_ACCMODE | O_RDONLY,
            false => flags,
        }
    };
    // SAFETY: the call that this function stands for, with the caller's arguments.
    unsafe { syscall(SYS_OPENAT, AT_FDCWD, path, flags, mode) as c_int }
}

/// `open` without a mode, as checked by the C library (`_FORTIFY_SOURCE`).
///
/// # Safety
/// As `open(2)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn __open64_2(path: *const c_char, flags: c_int) -> c_int {
    // SAFETY: by this function's own contract.
    unsafe { open64(path, flags, 0) }
}

/// `fallocate` of a program that is compiled for large files.
///
/// # Safety
/// As `fallocate(2)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fallocate64(fd: c_int, mode: c_int, offset: i64, bytes: i64) -> c_int {
    if mode == PUNCH && may_only_read(fd) && is_on() {
        return 0;
    }
    // SAFETY: the call that this function stands for, with the caller's arguments.
    unsafe { syscall(SYS_FALLOCATE, fd, mode, offset, bytes) as c_int }
}

fn may_only_read(fd: c_int) -> bool {
    // SAFETY: F_GETFL takes no argument and changes nothing.
    let flags = unsafe { fcntl(fd, F_GETFL) };
    flags >= 0 && flags & O_ACCMODE == O_RDONLY
}

fn is_on() -> bool {
    let mut byte = 0u8;
    // SAFETY: the value of a variable is a C string; one byte is read into one byte.
    unsafe {
        let fd = getenv(SWITCH.as_ptr());
        !fd.is_null() && pread64(atoi(fd), &raw mut byte, 1, 0) == 1 && byte == 1
    }
}

#[panic_handler]
fn never(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}
