//! Compiles what is loaded into the QEMU of a clone.

use std::path::PathBuf;
use std::process::Command;
use std::{env, fs};

const SOURCE: &str = "preload/discard.rs";

fn main() {
    println!("cargo::rerun-if-changed={SOURCE}");
    let set = |name: &str| env::var_os(name).unwrap_or_else(|| panic!("cargo sets {name}"));
    let out = PathBuf::from(set("OUT_DIR")).join("discard.so");
    let mut rustc = Command::new(set("RUSTC"));
    rustc.args(["--edition", "2024", "--crate-type", "cdylib", "--crate-name", "discard"]);
    rustc.args(["-D", "warnings", "-C", "panic=abort", "-C", "opt-level=s", "-C", "strip=symbols"]);
    rustc.arg("--target").arg(set("TARGET")).arg("-o").arg(&out).arg(SOURCE);
    if let Some(linker) = env::var_os("RUSTC_LINKER") {
        rustc.arg("-C").arg(format!("linker={}", linker.to_string_lossy()));
    }
    let ended = rustc.status();
    if !ended.as_ref().is_ok_and(std::process::ExitStatus::success) {
        println!("cargo::error={SOURCE} does not compile: {ended:?}");
        std::process::exit(1);
    }
    assert!(fs::metadata(&out).is_ok_and(|m| m.len() > 0), "an empty library");
}
