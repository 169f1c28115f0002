//! Compiles the scheduler for the kernel (BPF) and the Rust side of its maps.

use std::path::PathBuf;
use std::process::Command;
use std::{env, fs};

use libbpf_cargo::SkeletonBuilder;

/// What compiles BPF, best first. `GODWIT_CLANG` names another.
const CLANGS: [&str; 4] = ["clang-19", "clang-20", "clang-21", "clang"];
/// The first version that knows all that the source uses.
const OLDEST: u32 = 19;

fn main() {
    println!("cargo::rerun-if-changed=src/bpf");
    println!("cargo::rerun-if-env-changed=GODWIT_CLANG");
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets it")).join("sched.skel.rs");
    let given = env::var("GODWIT_CLANG").ok();
    let clang = given.iter().map(String::as_str).chain(CLANGS).find(|c| is_recent(c));
    let Some(clang) = clang else {
        println!(
            "cargo::error=the kernel scheduler is compiled by clang {OLDEST} or newer, and there is \
             none; scripts/setup installs clang-19, or set GODWIT_CLANG"
        );
        std::process::exit(1);
    };
    let built = SkeletonBuilder::new()
        .source("src/bpf/sched.bpf.c")
        .clang(clang)
        .clang_args(["-Isrc/bpf", "-mcpu=v3", "-Wall", "-Wno-compare-distinct-pointer-types"])
        .build_and_generate(&out);
    if let Err(error) = built {
        println!("cargo::error=the kernel scheduler does not compile: {error:#}");
        std::process::exit(1);
    }
    assert!(fs::metadata(&out).is_ok_and(|m| m.len() > 0), "an empty skeleton");
}

fn is_recent(clang: &str) -> bool {
    let Ok(output) = Command::new(clang).arg("--version").output() else { return false };
    let said = String::from_utf8_lossy(&output.stdout);
    let version = said.split("version ").nth(1).and_then(|v| v.split('.').next()?.parse().ok());
    version.is_some_and(|v: u32| v >= OLDEST)
}
