//! A real parallel build: a small C tree is generated and compiled by the machine's own compiler
//! with so many jobs at once, linked, and the program's answer checked. Like kernbench it sleeps,
//! reads, writes and starts processes; unlike kernbench it is some dozens of files.

use std::fmt::Write as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use anyhow::{Context, ensure};
use serde::Serialize;

use crate::mix::mix;

/// Functions in one unit.
const FUNCTIONS: u64 = 40;

/// A build's result.
#[derive(Debug, Clone, Serialize)]
pub struct Built {
    /// Always `kernbench-cc`.
    pub standin: &'static str,
    /// What it stands in for.
    pub stands_for: &'static str,
    /// Compilations at once.
    pub jobs: usize,
    /// Units compiled.
    pub operations: u64,
    /// From the first compiler's start to the linker's end.
    pub elapsed_ms: f64,
    /// What the built program printed, which is what it must.
    pub digest: String,
}

/// Builds `units` units with `jobs` compilers at once, in a directory of its own.
///
/// # Errors
/// No `cc`, a compiler that fails, a program with the wrong answer, or `stop` set meanwhile.
pub fn build(units: u64, jobs: usize, seed: u64, stop: &AtomicBool) -> anyhow::Result<Built> {
    ensure!((1..=10_000).contains(&units), "1 to 10000 units can be built, not {units}");
    ensure!((1..=256).contains(&jobs), "1 to 256 jobs can run at once, not {jobs}");
    let dir = tempfile::tempdir().context("make a directory for the tree")?;
    let dir = dir.path();
    let mut sum = 0;
    for unit in 0..units {
        let (text, value) = source(seed, unit);
        sum = (sum + value) % MODULUS;
        std::fs::write(dir.join(format!("u{unit}.c")), text).context("write a unit")?;
    }
    std::fs::write(dir.join("main.c"), main_source(units)).context("write the main unit")?;
    let begun = Instant::now();
    let names: Vec<String> =
        (0..units).map(|u| format!("u{u}")).chain(["main".to_owned()]).collect();
    let mut left = names.iter();
    let mut running: Vec<(String, Child)> = Vec::new();
    loop {
        if stop.load(Ordering::Relaxed) {
            for (_, child) in &mut running {
                // One that has ended already is what is wanted.
                let _ = child.kill();
                let _ = child.wait();
            }
            anyhow::bail!("told to end before the build was done");
        }
        if running.len() < jobs
            && let Some(name) = left.next()
        {
            running.push((name.clone(), compile(dir, name)?));
            continue;
        }
        if running.is_empty() {
            break;
        }
        // The oldest first: units are alike, so it is nearly always the next to end.
        let (name, mut child) = running.remove(0);
        let status = child.wait().with_context(|| format!("wait for the compiler of {name}"))?;
        ensure!(status.success(), "the compiler of {name}.c failed: {status}");
    }
    let objects = names.iter().map(|n| format!("{n}.o"));
    let linked = Command::new("cc")
        .current_dir(dir)
        .args(["-o", "program"])
        .args(objects)
        .status()
        .context("start the linker")?;
    ensure!(linked.success(), "the linker failed: {linked}");
    let elapsed = begun.elapsed();
    let said = Command::new(dir.join("program")).output().context("start the built program")?;
    let said = String::from_utf8_lossy(&said.stdout).trim().to_owned();
    ensure!(said == sum.to_string(), "the built program says {said:?}, not {sum}");
    Ok(Built {
        standin: "kernbench-cc",
        stands_for: "stand-in for kernbench: a real build, of a small generated tree",
        jobs,
        operations: units + 1,
        elapsed_ms: elapsed.as_secs_f64() * 1e3,
        digest: said,
    })
}

fn compile(dir: &Path, name: &str) -> anyhow::Result<Child> {
    Command::new("cc")
        .current_dir(dir)
        .args(["-O2", "-c", "-o", &format!("{name}.o"), &format!("{name}.c")])
        .stdin(Stdio::null())
        .spawn()
        .context("start cc: the build needs a C compiler on the path")
}

const MODULUS: u64 = 1_000_003;

/// A unit's text, and what its function returns.
fn source(seed: u64, unit: u64) -> (String, u64) {
    let mut text = String::new();
    let mut value = 0;
    for f in 0..FUNCTIONS {
        let k = mix(seed ^ mix(unit * FUNCTIONS + f)) % MODULUS;
        // Writing to a string does not fail.
        let _ = writeln!(
            text,
            "static unsigned long f{f}(unsigned long x) {{ unsigned long t[16]; for (int i = 0; i < 16; i++) \
             t[i] = x * {k}ul + i; for (int i = 1; i < 16; i++) t[i] ^= t[i - 1] >> 3; \
             return (x + {k}ul + (t[15] & 0)) % {MODULUS}ul; }}"
        );
        value = (value + k) % MODULUS;
    }
    let _ = writeln!(text, "unsigned long u{unit}(void) {{ unsigned long x = 0;");
    for f in 0..FUNCTIONS {
        let _ = writeln!(text, "x = f{f}(x);");
    }
    text.push_str("return x; }\n");
    (text, value)
}

fn main_source(units: u64) -> String {
    let mut text = "#include <stdio.h>\n".to_owned();
    for u in 0..units {
        let _ = writeln!(text, "unsigned long u{u}(void);");
    }
    text.push_str("int main(void) { unsigned long x = 0;\n");
    for u in 0..units {
        let _ = writeln!(text, "x = (x + u{u}()) % {MODULUS}ul;");
    }
    text.push_str("printf(\"%lu\\n\", x); return 0; }\n");
    text
}
