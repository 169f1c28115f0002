//! What the command says of itself.

use std::process::Command;

fn stdout_of(args: &[&str]) -> String {
    let out = Command::new(env!("CARGO_BIN_EXE_godwit"))
        .args(args)
        .env("COLUMNS", "80")
        .output()
        .expect("run");
    assert!(out.status.success(), "{args:?}");
    String::from_utf8(out.stdout).expect("text")
}

#[test]
fn every_noun_and_verb_is_in_the_help() {
    let help = stdout_of(&["--help"]);
    for noun in [
        "up",
        "down",
        "vm",
        "substrate",
        "image",
        "site",
        "op",
        "pool",
        "doctor",
        "tenant",
        "user",
        "token",
        "grant",
        "quota",
        "audit",
    ] {
        assert!(help.lines().any(|l| l.trim_start().starts_with(noun)), "{noun}\n{help}");
    }
    let words = help.split_whitespace().collect::<Vec<_>>().join(" ");
    assert!(words.contains("3 unchanged, 4 not found"), "{help}");
    let vm = stdout_of(&["vm", "--help"]);
    for verb in [
        "create",
        "activate",
        "list",
        "get",
        "stop",
        "start",
        "delete",
        "dock",
        "migrate",
        "console",
        "screenshot",
        "type",
        "view",
    ] {
        assert!(vm.lines().any(|l| l.trim_start().starts_with(verb)), "{verb}\n{vm}");
    }
}

/// What a command line that is wrong is told, with exit code 2.
fn wrong(args: &[&str]) -> String {
    let out = Command::new(env!("CARGO_BIN_EXE_godwit"))
        .args(args)
        .env("GODWIT_CONFIG", "/nowhere")
        .env("GODWIT_IMAGES", "/nowhere")
        .env("GODWIT_API", "https://127.0.0.1:1")
        .output()
        .expect("run");
    assert_eq!(out.status.code(), Some(2), "{args:?}");
    assert!(out.stdout.is_empty(), "{args:?}");
    String::from_utf8(out.stderr).expect("text")
}

#[test]
fn a_wrong_command_line_is_refused_in_words() {
    let create = ["vm", "create", "--image", "tiny"];
    for (args, expected) in [
        (&["--vcpus", "300"][..], "300 is not in 1..=64"),
        (&["--memory", "4X"], "write 512 (MiB), 512M or 4G"),
        (&["--name", "no\u{202e}sdrawkcab"], "\\u{202e}"),
        (&["--site", "x\x1b[2J"], "\\u{1b}"),
    ] {
        let words = wrong(&[&create[..], args].concat());
        assert!(words.contains(expected), "{words}");
        assert!(!words.contains(['\u{202e}', '\u{1b}']), "{words}");
    }
    let words = wrong(&["op", "wait", "x"]);
    assert!(words.contains("not an operation's id; see: godwit op list"), "{words}");
    let words = wrong(&["vm", "get", &"n".repeat(5000)]);
    assert!(words.len() < 1000, "{} bytes", words.len());
    // What the environment sets is not told to be needed.
    for args in [&["vm", "list", "--nope"][..], &["up", "--nope"], &["image", "inspect"]] {
        let words = wrong(args);
        assert!(words.contains("Usage: ") && !words.contains("--config"), "{words}");
        assert!(!words.contains("--images") && !words.contains("--api"), "{words}");
    }
}

#[test]
fn completion_and_manual_pages_are_made() {
    assert!(stdout_of(&["completion", "bash"]).contains("_godwit()"));
    assert!(stdout_of(&["man"]).contains(".TH godwit 1"));
    let dir = tempfile::tempdir().expect("dir");
    stdout_of(&["man", "--dir", dir.path().to_str().expect("path")]);
    assert!(dir.path().join("godwit-vm-migrate.1").exists());
}
