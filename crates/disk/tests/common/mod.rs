//! Real images made with QEMU's own tools.
#![allow(dead_code)]

use std::path::Path;
use std::process::Command;

pub(crate) const MIB: u64 = 1 << 20;

/// Runs a tool to its end and returns what it said; panics if it fails.
pub(crate) fn run(tool: &str, args: &[&str]) -> String {
    let out = Command::new(tool).args(args).output().expect("the tool starts");
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    let err = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "{tool} {args:?}: {text}{err}");
    assert!(!text.contains("Pattern verification failed"), "{tool} {args:?}: {text}");
    text
}

pub(crate) fn qemu_io(path: &Path, format: &str, commands: &[&str]) {
    let mut args = vec!["-f", format];
    for c in commands {
        args.extend(["-c", c]);
    }
    args.push(path.to_str().expect("UTF-8"));
    run("qemu-io", &args);
}

/// Equal contents, by QEMU's own word.
pub(crate) fn same(a: (&Path, &str), b: (&Path, &str)) {
    run("qemu-img", &["compare", "-f", a.1, "-F", b.1, &s(a.0), &s(b.0)]);
}

pub(crate) fn s(p: &Path) -> String {
    p.to_str().expect("UTF-8").to_owned()
}

/// A base of `mib` MiB whose blocks all differ.
pub(crate) fn base(path: &Path, mib: u64) {
    let mut data = vec![0u8; (mib * MIB) as usize];
    for (i, block) in data.chunks_mut(4096).enumerate() {
        for (j, b) in block.iter_mut().enumerate() {
            *b = (i * 7 + j * 13 + 1) as u8;
        }
    }
    std::fs::write(path, data).expect("room in the temporary directory");
}
