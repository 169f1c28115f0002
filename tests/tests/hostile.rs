//! Requests, names, images, archives and stored bytes that are not what they should be.
#![allow(clippy::unwrap_used)]

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::time::Duration;

use godwit_tests::{Body, Cloud, Daemon, Reply, Setup, flip, within};
use godwit_types::Hash;
use serde_json::{Value, json};

/// What is no name, for one reason or another.
fn no_names() -> Vec<String> {
    let tricks = [
        "",
        ".",
        "..",
        "../x",
        "/etc/passwd",
        "a/b",
        "a\\b",
        "a\0b",
        "a\nb",
        "a b",
        "-x",
        "A",
        "a%2fb",
        "a;b",
        "a,b=c",
        "$(id)", // Letters that only look like ours: fullwidth, Cyrillic, a joiner.
        "ａ",
        "саfе",
        "a\u{200d}b",
        "a\u{202e}b",
    ];
    let mut all: Vec<String> = tricks.iter().map(|t| (*t).to_owned()).collect();
    all.extend(["a".repeat(41), "n".repeat(5_000)]);
    all
}

/// The bytes of a text as a part of a path.
fn escaped(text: &str) -> String {
    text.bytes().map(|b| format!("%{b:02x}")).collect()
}

fn refused(reply: &Reply, what: &str) {
    assert!((400..500).contains(&reply.status), "{what}: {} {}", reply.status, reply.text);
    assert!(!reply.message().is_empty(), "{what}");
}

fn untouched(cloud: &Cloud) {
    for list in [["vm", "list"], ["op", "list"], ["substrate", "list"]] {
        assert_eq!(cloud.ok(&list), json!([]), "{list:?}");
    }
    assert_eq!(cloud.ok(&["site", "token", "list"]), json!([]));
    assert_eq!(cloud.ok(&["site", "list"]).as_array().unwrap().len(), 1);
}

#[test]
fn names_that_are_none_are_refused_wherever_one_is_taken() {
    let cloud = Cloud::center_only();
    let api = cloud.api();
    for bad in no_names() {
        let post = |path: &str, body: Value| {
            let what = format!("{path} {body}");
            refused(&api.ask("POST", path, Body::Whole(body.to_string().as_bytes())), &what);
        };
        post("/v1/vms", json!({ "image": "tiny", "name": bad }));
        post("/v1/vms", json!({ "image": bad, "name": "x" }));
        post("/v1/vms", json!({ "substrate": bad, "name": "x" }));
        post("/v1/vms", json!({ "image": "tiny", "name": "x", "site": bad }));
        post("/v1/vms/x/dock", json!({ "name": bad }));
        post("/v1/vms/x/migrate", json!({ "to": bad }));
        post("/v1/vms/x/migrate", json!({ "scheme": bad }));
        post("/v1/tokens", json!({ "site": bad }));
        let e = escaped(&bad);
        for path in [
            format!("/v1/vms/{e}"),
            format!("/v1/vms/{e}/console"),
            format!("/v1/sites/{e}"),
            format!("/v1/images/{e}"),
            format!("/v1/substrates/{e}/export"),
            format!("/v1/ops/{e}"),
            format!("/v1/vms?site={e}"),
            format!("/v1/images?site={e}"),
        ] {
            // With nothing in the middle it is another path, which may be there.
            if !bad.is_empty() || path.contains('?') {
                refused(&api.ask("GET", &path, Body::None), &path);
            }
        }
        for path in [format!("/v1/vms/{e}"), format!("/v1/sites/{e}"), format!("/v1/tokens/{e}")] {
            refused(&api.ask("DELETE", &path, Body::None), &path);
        }
        refused(&api.ask("POST", &format!("/v1/pool/{e}/check"), Body::None), "pool check");
        refused(&api.ask("POST", &format!("/v1/images/{e}/build"), Body::None), "image build");
        let import = format!("/v1/substrates?name={e}");
        let kind = "application/octet-stream";
        refused(&api.ask_as("POST", &import, kind, Body::Whole(b"GWSA")), &import);
        // The command line does not even ask.
        if !bad.contains('\0') && !bad.starts_with('-') {
            let file = cloud.file("out.gwsa");
            // The name of a substrate of another tenant, which is not there.
            let exit = if bad == "a/b" { 4 } else { 2 };
            let _ = cloud.refused(&["substrate", "export", &bad, file.to_str().unwrap()], exit);
            let _ = cloud.refused(&["site", "revoke", &bad], 2);
            let _ = cloud.refused(&["site", "token", "withdraw", &bad], 2);
            assert!(!file.exists());
        }
    }
    // Bytes that are no text at all.
    refused(&api.ask("GET", "/v1/vms/%ff%fe", Body::None), "no text");
    untouched(&cloud);
}

#[test]
fn bodies_that_are_too_long_or_malformed_are_refused_and_the_daemon_lives_on() {
    let cloud = Cloud::center_only();
    let api = cloud.api();
    // What is older than TLS 1.3 is not spoken; of the protocols on it the client chooses.
    let (new, old) = (&rustls::version::TLS13, &rustls::version::TLS12);
    assert_eq!(api.picks(&[old], &[b"http/1.1"]), None);
    assert_eq!(api.picks(&[new], &[b"h2", b"http/1.1"]).as_deref(), Some(&b"h2"[..]));
    assert_eq!(api.picks(&[new, old], &[b"http/1.1"]).as_deref(), Some(&b"http/1.1"[..]));
    // Once, so that what is made at the first request is there.
    refused(&api.ask("POST", "/v1/vms", Body::Whole(b"{")), "half a body");
    let before = cloud.resident_mib(Daemon::Center);

    for (what, body) in [
        ("2 MiB", Body::Whole(&[b' '; 2 << 20])),
        ("8 MiB in chunks", Body::Endless(8)),
        ("70 GiB announced", Body::Claimed(70 << 30, b"{")),
    ] {
        let reply = api.ask("POST", "/v1/vms", body);
        assert_eq!(reply.status, 413, "{what}: {}", reply.text);
        assert!(reply.message().contains("over 1048576 bytes"), "{what}: {}", reply.text);
    }
    // One that never ends is cut off; whether its sender still hears why is not certain.
    let reply = api.ask("POST", "/v1/vms", Body::Endless(200));
    assert!([0, 413].contains(&reply.status), "{}", reply.status);
    let octets = "application/octet-stream";
    let import = |body| api.ask_as("POST", "/v1/substrates", octets, body);
    let reply = import(Body::Claimed(70 << 30, b"GWSA"));
    assert_eq!(reply.status, 413, "{}", reply.text);
    assert!(reply.message().contains("64 GiB"), "{}", reply.text);
    let reply = import(Body::Endless(8));
    assert_eq!(reply.status, 422, "{}", reply.text);
    assert!([0, 422].contains(&import(Body::Endless(200)).status));

    let deep = "[".repeat(200_000);
    for bad in [
        &b"{"[..],
        b"[]",
        b"null",
        b"{}{}",
        b"{\"image\":\"tiny\"",
        b"\xff\xfe{}",
        b"{\"image\":7}",
        b"{\"image\":\"tiny\",\"vcpus\":-1}",
        b"{\"image\":\"tiny\",\"vcpus\":1e9}",
        b"{\"image\":\"tiny\",\"memory_mib\":99999999999999999999}",
        b"{\"image\":\"tiny\",\"memory_mib\":1}",
        b"{\"image\":\"tiny\",\"surprise\":1}",
        b"{\"image\":\"tiny\",\"substrate\":\"base\"}",
        deep.as_bytes(),
    ] {
        let what = String::from_utf8_lossy(&bad[..bad.len().min(60)]).into_owned();
        refused(&api.ask("POST", "/v1/vms", Body::Whole(bad)), &what);
    }
    let sound = Body::Whole(b"{\"site\":\"cafe\"}");
    for kind in ["text/plain", "application/x-www-form-urlencoded", "", "application/jsonp"] {
        let reply = api.ask_as("POST", "/v1/tokens", kind, sound);
        assert_eq!(reply.status, 400, "{kind:?}: {}", reply.text);
    }
    let reply = api.ask_as("POST", "/v1/substrates", "application/json", Body::Whole(b"GWSA"));
    assert_eq!(reply.status, 400, "{}", reply.text);
    refused(&api.ask("PUT", "/v1/vms", Body::None), "a method that is none");
    refused(&api.ask("POST", "/v1/vms?dry_runn=true", Body::None), "a parameter that is none");
    for raw in [&b"\0\0\0\0\r\n\r\n"[..], b"GET /v1/vms HTTP/9.9\r\n\r\n", b"NONSENSE\r\n\r\n"] {
        let status = api.raw(raw).status;
        assert!(status == 0 || (400..600).contains(&status), "{raw:?}: {status}");
    }
    let long = format!("GET /v1/vms HTTP/1.1\r\nX: {}\r\n\r\n", "x".repeat(1 << 20));
    assert!([0, 400, 431].contains(&api.raw(long.as_bytes()).status));
    let wrong =
        "GET /v1/vms HTTP/1.1\r\nHost: c\r\nConnection: close\r\nAuthorization: Bearer x\r\n\r\n";
    assert_eq!(api.raw(wrong.as_bytes()).status, 401);

    untouched(&cloud);
    let after = cloud.resident_mib(Daemon::Center);
    assert!(after < before + 96, "the center has grown from {before} to {after} MiB");
}

fn images_of_host() -> PathBuf {
    std::env::var_os("GODWIT_IMAGES")
        .map_or_else(|| PathBuf::from("/var/cache/godwit/images"), PathBuf::from)
}

/// An image cache of the test's own with a copy of `tiny`; gives the copy's directory.
fn own_images(cache: &Path) -> PathBuf {
    let from = images_of_host();
    let target = std::fs::read_link(from.join("tiny")).unwrap();
    let dir = cache.join(&target);
    std::fs::create_dir_all(&dir).unwrap();
    for entry in std::fs::read_dir(from.join(&target)).unwrap().flatten() {
        let to = dir.join(entry.file_name());
        std::fs::copy(entry.path(), &to).unwrap();
        let mut rights = std::fs::metadata(&to).unwrap().permissions();
        std::os::unix::fs::PermissionsExt::set_mode(&mut rights, 0o644);
        std::fs::set_permissions(&to, rights).unwrap();
    }
    std::os::unix::fs::symlink(&target, cache.join("tiny")).unwrap();
    dir
}

/// Writes an image's description with other contents, under the hash that these have.
fn describe(dir: &Path, change: impl Fn(&str) -> String) -> String {
    let text = std::fs::read_to_string(dir.join("image.json")).unwrap();
    let (_, rest) = text.split_once("\"contents\":").unwrap();
    let pretty = rest.trim().strip_suffix('}').unwrap().trim();
    // No value has a space before or after a line's end, so this is the canonical text.
    let compact: String = pretty
        .lines()
        .map(|l| l.trim_start().replacen("\": ", "\":", 1))
        .collect::<Vec<_>>()
        .concat();
    assert!(text.contains(&Hash::of(compact.as_bytes()).to_string()), "{compact}");
    let other = change(&compact);
    let hash = Hash::of(other.as_bytes()).to_string();
    std::fs::write(dir.join("image.json"), format!("{{\"hash\":\"{hash}\",\"contents\":{other}}}"))
        .unwrap();
    hash
}

#[test]
fn an_image_that_is_not_what_it_says_boots_nothing() {
    let images = tempfile::tempdir().unwrap();
    let dir = own_images(images.path());
    let flag = format!("--images={}", images.path().display());
    let cloud = Setup::new().flag(Daemon::Center, &flag).center_only();
    let create = ["vm", "create", "--image", "tiny", "--name", "a"];
    let refuse = |named: &str| {
        let a = cloud.run(&create);
        assert!(a.exit > 0 && a.stderr.contains(named), "{named}: {} {}", a.exit, a.stderr);
        assert_eq!(cloud.ok(&["vm", "list"]), json!([]), "{named}");
        let left = std::fs::read_dir(cloud.site_dir(Daemon::Center).join("data/vms")).unwrap();
        assert_eq!(left.count(), 0, "{named}");
    };
    let (json, disk) = (dir.join("image.json"), dir.join("disk"));
    let source = images_of_host().join("tiny/disk");
    let sound = std::fs::read_to_string(&json).unwrap();
    let bytes = std::fs::metadata(&disk).unwrap().len();
    let resize = |n: u64| std::fs::File::options().write(true).open(&disk).unwrap().set_len(n);

    resize(bytes / 2).unwrap();
    refuse("disk is not a file of");
    resize(bytes).unwrap();
    std::fs::write(&json, sound.replace("quiet", "init=/bin/sh")).unwrap();
    refuse("its contents do not match its hash");
    std::fs::write(&json, &sound[..sound.len() / 2]).unwrap();
    refuse("image.json");
    std::fs::write(&json, sound.replace("\"file\": \"disk\"", "\"file\": \"../disk\"")).unwrap();
    refuse("is not a plain one");
    // Every file of the right length, and one bit of the disk turned over.
    std::fs::write(&json, &sound).unwrap();
    let copy = std::fs::read(&source).unwrap();
    std::fs::write(&disk, &copy).unwrap();
    flip(&disk, bytes / 2);
    refuse("disk");
    // Sound in itself, but another image than the one that the name leads to.
    std::fs::write(&json, &sound).unwrap();
    describe(&dir, |c| c.replace("\"vcpus\":1", "\"vcpus\":2"));
    refuse("it leads to another image");

    // A qcow2 file with a backing file of its own in place of the raw base.
    std::fs::write(&json, &sound).unwrap();
    resize(0).unwrap();
    let mut head = vec![0; 4096];
    head[..8].copy_from_slice(b"QFI\xfb\0\0\0\x03");
    head[8..20].copy_from_slice(&[0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 11]);
    head[512..523].copy_from_slice(b"/etc/passwd");
    std::fs::write(&disk, &head).unwrap();
    let (old, new) = (Hash::of(b"not looked at"), Hash::of(&head));
    assert_ne!(old, new);
    let hash = describe(&dir, |c| {
        let whole: Value = serde_json::from_str(c).unwrap();
        let was = whole["disk"]["hash"].as_str().unwrap();
        c.replace(was, &new.to_string()).replace(&format!(":{bytes}}}"), ":4096}")
    });
    let moved = dir.with_file_name(&hash);
    std::fs::rename(&dir, &moved).unwrap();
    std::fs::remove_file(images.path().join("tiny")).unwrap();
    std::os::unix::fs::symlink(Path::new("by-hash").join(&hash), images.path().join("tiny"))
        .unwrap();
    refuse("a base must be raw, and this is qcow2");
}

/// An archive with other words in its manifest, whole in itself.
fn with_manifest(good: &[u8], change: impl Fn(&str) -> String) -> Vec<u8> {
    let len = u32::from_le_bytes(good[6..10].try_into().unwrap()) as usize;
    let json = change(std::str::from_utf8(&good[10..10 + len]).unwrap());
    let mut out = good[..6].to_vec();
    out.extend_from_slice(&(json.len() as u32).to_le_bytes());
    out.extend_from_slice(json.as_bytes());
    out.extend_from_slice(&good[10 + len..good.len() - 32]);
    let sum = Hash::of(&out);
    out.extend_from_slice(&sum.0);
    out
}

#[test]
fn a_substrate_of_another_qemu_is_refused_and_rebuilt() {
    let cloud = Cloud::center_only();
    let good = std::fs::read(cloud.substrate_archive()).unwrap();
    let len = u32::from_le_bytes(good[6..10].try_into().unwrap()) as usize;
    let manifest: Value = serde_json::from_slice(&good[10..10 + len]).unwrap();
    let qemu = manifest.pointer("/machine/qemu").unwrap().as_str().unwrap();
    // A patch of the same series would do.
    let (was, is) = (format!("\"{qemu}\""), "\"9.2.4\"");
    let file = cloud.file("old.gwsa");
    std::fs::write(&file, with_manifest(&good, |m| m.replacen(&was, is, 1))).unwrap();
    let _ = cloud.ok(&["substrate", "import", file.to_str().unwrap()]);
    let old = cloud.ok(&["substrate", "get", "base"])["id"].as_str().unwrap().to_owned();
    let words = cloud.refused(&["vm", "activate", "base", "--name", "a"], 5);
    assert!(words.contains("qemu is \"9.2.4\" in the saved state"), "{words}");
    assert!(words.contains("godwit substrate rebuild base"), "{words}");

    let _ = cloud.ok(&["substrate", "rebuild", "base"]);
    let new = cloud.ok(&["substrate", "get", "base"])["id"].as_str().unwrap().to_owned();
    assert_ne!(new, old);
    assert_eq!(cloud.ok(&["substrate", "list"]).as_array().unwrap().len(), 1);
    assert_eq!(cloud.ok(&["vm", "list"]), json!([]));
    let _ = cloud.ok(&["vm", "activate", "base", "--name", "a"]);
    cloud.runs_at("a", "center");
}

#[test]
fn a_substrate_of_another_machine_is_refused_by_the_field_that_differs() {
    let cloud = Cloud::center_only();
    let good = std::fs::read(cloud.substrate_archive()).unwrap();
    let len = u32::from_le_bytes(good[6..10].try_into().unwrap()) as usize;
    let manifest: Value = serde_json::from_slice(&good[10..10 + len]).unwrap();
    let field = |path: &str| manifest.pointer(path).unwrap().as_str().unwrap().to_owned();
    let (qemu, machine, image) =
        (field("/machine/qemu"), field("/machine/machine"), field("/image_hash"));
    let file = cloud.file("x.gwsa");
    let put = |bytes: &[u8]| {
        std::fs::write(&file, bytes).unwrap();
        cloud.run(&["substrate", "import", file.to_str().unwrap()])
    };
    let activate = ["vm", "activate", "base", "--name", "a"];
    let elsewhere = Hash::of(b"another image").to_string();
    for (was, is, named) in [
        (qemu.as_str(), "9.2.0", "qemu is \"9.2.0\" in the saved state"),
        (machine.as_str(), "pc-q35-9.2", "machine is \"pc-q35-9.2\" in the saved state"),
        (image.as_str(), elsewhere.as_str(), "does not hold image 'tiny' with the hash"),
    ] {
        let a = put(&with_manifest(&good, |m| {
            m.replacen(&format!("\"{was}\""), &format!("\"{is}\""), 1)
        }));
        assert_eq!(a.exit, 0, "{named}: {}", a.stderr);
        let words = cloud.refused(&activate, 5);
        assert!(words.contains(named), "{named}: {words}");
        assert_eq!(cloud.ok(&["vm", "list"]), json!([]), "{named}");
        let left = std::fs::read_dir(cloud.site_dir(Daemon::Center).join("data/vms")).unwrap();
        assert_eq!(left.count(), 0, "{named}");
        let _ = cloud.ok(&["substrate", "delete", "base"]);
    }
    // What contradicts itself or is of a form that is not known is not even taken in.
    for (was, is, named) in [
        ("\"format\": 1", "\"format\": 2", "form 2 is not known here"),
        ("\"vcpus\": 1", "\"vcpus\": 2", "its shape and its machine manifest disagree"),
        ("\"name\": \"base\"", "\"name\": \"../base\"", "is not a valid name"),
        ("\"kind\"", "\"kin\"", "unknown field `kin`"),
    ] {
        let a = put(&with_manifest(&good, |m| m.replacen(was, is, 1)));
        assert!(a.exit == 1 && a.stderr.contains(named), "{named}: {} {}", a.exit, a.stderr);
        assert_eq!(cloud.ok(&["substrate", "list"]), json!([]), "{named}");
    }
    let a = put(&good);
    assert_eq!(a.exit, 0, "{}", a.stderr);
    let _ = cloud.ok(&activate);
    cloud.guest("a").intact(0);
}

/// Where the store keeps one of these units: the pack, a byte of the unit's body, and the hash. A
/// record has a head of 44 bytes: the body's length is at 8, the hash at the end.
fn stored(store: &Path, units: &HashSet<Vec<u8>>) -> (PathBuf, u64, String) {
    for entry in std::fs::read_dir(store).unwrap().flatten() {
        let bytes = std::fs::read(entry.path()).unwrap_or_default();
        let mut at = 0;
        while bytes.get(at..at + 4).is_some_and(|magic| magic == b"GWU1") {
            let body = usize::from(u16::from_le_bytes([bytes[at + 8], bytes[at + 9]]));
            if units.contains(&bytes[at + 12..at + 44]) {
                let hash = bytes[at + 12..at + 44].iter().map(|b| format!("{b:02x}")).collect();
                return (entry.path(), (at + 44 + body / 2) as u64, hash);
            }
            at += 44 + body;
        }
    }
    panic!("none of {} units is in {}", units.len(), store.display());
}

/// The hashes that a page map names; a checksum follows them.
fn hashes(map: &Path) -> HashSet<Vec<u8>> {
    let bytes = std::fs::read(map).unwrap();
    let body = &bytes[..bytes.len() - 32];
    body.rchunks_exact(32).map(<[u8]>::to_vec).collect()
}

#[test]
fn a_flipped_bit_in_memory_disk_or_device_state_starts_no_machine() {
    let mut cloud = Cloud::center_only();
    cloud.bring_substrate();
    // What was just brought is in memory still.
    cloud.kill(Daemon::Center);
    cloud.restart_center();
    let data = cloud.site_dir(Daemon::Center).join("data");
    let substrates = data.join("substrates");
    let id = std::fs::read_dir(&substrates).unwrap().flatten().next().unwrap().file_name();
    let dir = substrates.join(&id);
    let store = packs(&data.join("store"));
    let activate = ["vm", "activate", "base", "--name", "a"];

    let state = (dir.join("state"), 1000, "state is damaged".to_owned());
    let (pages, blocks) = (hashes(&dir.join("pages")), hashes(&dir.join("disk")));
    let page = stored(&store, &pages);
    // One that is no page of the memory too, for those have been read when it is needed.
    let block = stored(&store, &(&blocks - &pages));
    let damages = [page, block, state];
    // The tombstone of the machine that was docked may be there.
    let records = || std::fs::read_dir(data.join("vms")).map_or(0, Iterator::count);
    let before = records();
    // In the order in which an activation comes to need them.
    for (file, at, named) in &damages {
        flip(file, *at);
        let a = cloud.run(&activate);
        let found = a.stderr.contains(named) && a.stderr.contains("damaged");
        assert!(a.exit == 1 && found, "{named} in {}: {} {}", file.display(), a.exit, a.stderr);
        assert_eq!(cloud.ok(&["vm", "list"]), json!([]), "{named}");
        assert_eq!(records(), before, "{named}");
        flip(file, *at);
    }
    // A check names each of them.
    for (file, at, _) in &damages {
        flip(file, *at);
    }
    let words = cloud.refused(&["pool", "check", "--site", "center"], 1);
    for (file, at, named) in &damages[..2] {
        assert!(words.contains(named), "{named}: {words}");
        flip(file, *at);
    }
    let words = cloud.refused(&["pool", "check", "--site", "center"], 1);
    assert!(words.contains(&damages[2].2), "{words}");
    flip(&damages[2].0, damages[2].1);
    let _ = cloud.ok(&activate);
    cloud.guest("a").intact(0);
    let _ = cloud.ok(&["pool", "check", "--site", "center"]);
}

/// The one substrate of a site.
fn substrate_dir(cloud: &Cloud, at: Daemon) -> PathBuf {
    let substrates = cloud.site_dir(at).join("data/substrates");
    std::fs::read_dir(substrates).unwrap().flatten().next().unwrap().path()
}

/// Turns a bit over in a file that its owner may not write to.
fn flip_sealed(path: &Path, at: u64) {
    use std::os::unix::fs::PermissionsExt;
    let was = std::fs::metadata(path).unwrap().permissions();
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).unwrap();
    flip(path, at);
    std::fs::set_permissions(path, was).unwrap();
}

#[test]
fn damage_in_what_clones_share_is_named_and_mended() {
    let cloud = Cloud::center_only();
    cloud.bring_substrate();
    let _ = cloud.ok(&["vm", "activate", "base", "--name", "a"]);
    let dir = substrate_dir(&cloud, Daemon::Center);
    let id = dir.file_name().unwrap().to_str().unwrap().to_owned();
    let layer = dir.join("ready/layer.qcow2");
    let memory = cloud.memory_dir(Daemon::Center).join(format!("substrates/{id}.mem"));
    // A QEMU that has both open waits for the next activation.
    within(Duration::from_secs(60), "a QEMU to wait", || {
        (cloud.ok(&["pool", "status"])[0]["waiting"] == 1).then_some(())
    });
    let check = ["pool", "check", "--site", "center"];
    let _ = cloud.ok(&check);
    let bytes = std::fs::read(&layer).unwrap();
    let data = (bytes.len() / 4096 * 4096 - 4096..).find(|at| bytes[*at] != 0).unwrap() as u64;
    let bytes = std::fs::read(&memory).unwrap();
    let page = (bytes.len() / 2..).find(|at| bytes[*at] != 0).unwrap() as u64;
    for (n, (file, at)) in [(&layer, data), (&memory, page)].into_iter().enumerate() {
        flip_sealed(file, at);
        let words = cloud.refused(&check, 1);
        assert!(words.contains("'base'") && words.contains(file.to_str().unwrap()), "{words}");
        within(Duration::from_secs(20), "the damage to be in the list", || {
            let s = cloud.ok(&["substrate", "get", "base"]);
            s["damaged"]["center"].is_string().then_some(())
        });
        assert!(cloud.run(&["substrate", "list"]).stdout.contains("center (damaged)"));
        let vm = format!("after{n}");
        let _ = cloud.ok(&["vm", "activate", "base", "--name", &vm]);
        cloud.guest(&vm).intact(0);
        let _ = cloud.ok(&check);
        within(Duration::from_secs(20), "the damage to be gone", || {
            let s = cloud.ok(&["substrate", "get", "base"]);
            s["damaged"].as_object().is_none_or(serde_json::Map::is_empty).then_some(())
        });
        // Without a check before: the activation sees it, also where a QEMU waits.
        within(Duration::from_secs(60), "a QEMU to wait", || {
            (cloud.ok(&["pool", "status"])[0]["waiting"] == 1).then_some(())
        });
        flip_sealed(file, at);
        let vm = format!("unchecked{n}");
        let _ = cloud.ok(&["vm", "activate", "base", "--name", &vm]);
        cloud.guest(&vm).intact(0);
        let _ = cloud.ok(&check);
    }
}

#[test]
fn a_damaged_substrate_goes_nowhere_and_a_sound_one_crosses_once() {
    let mut cloud = Cloud::start();
    cloud.bring_substrate();
    let dir = substrate_dir(&cloud, Daemon::Center);
    let store = packs(&cloud.site_dir(Daemon::Center).join("data/store"));
    let (pack, at, unit) = stored(&store, &hashes(&dir.join("pages")));
    // What was just brought is in memory still.
    cloud.kill(Daemon::Center);
    cloud.restart(Daemon::Center);
    flip(&pack, at);
    let file = cloud.file("out.gwsa");
    let export = ["substrate", "export", "base", file.to_str().unwrap()];
    let bring = ["vm", "activate", "base", "--name", "a", "--site", "cafe"];
    for command in [&export[..], &bring] {
        let words = cloud.refused(command, 1);
        for part in ["'base'", unit.as_str(), pack.file_name().unwrap().to_str().unwrap(), "offset"]
        {
            assert!(words.contains(part), "{part} of {command:?}: {words}");
        }
    }
    let left = |name: &str| {
        let all = std::fs::read_dir(cloud.root()).unwrap().flatten();
        all.filter(|e| e.file_name().to_string_lossy().starts_with(name)).count()
    };
    assert_eq!(left("out.gwsa"), 0);
    assert_eq!(cloud.ok(&["vm", "list"]), json!([]));
    flip(&pack, at);

    // What is no plain file is written to and stays what it is.
    let full = cloud.file("full");
    let made = std::process::Command::new("mknod").arg(&full).args(["c", "1", "7"]).status();
    assert!(made.unwrap().success());
    let words = cloud.refused(&["substrate", "export", "base", full.to_str().unwrap()], 1);
    assert!(words.contains("No space left"), "{words}");
    let kind = std::fs::metadata(&full).unwrap().file_type();
    assert!(std::os::unix::fs::FileTypeExt::is_char_device(&kind));
    assert_eq!(left("full"), 1);
    let good = cloud.run_export("base", &file);
    assert_eq!(good.exit, 0);
    let mut junk = std::fs::read(&file).unwrap();
    junk.extend_from_slice(b"junk");
    std::fs::write(&file, &junk).unwrap();
    let import = ["substrate", "import", file.to_str().unwrap(), "--name", "copy"];
    let words = cloud.refused(&import, 1);
    assert!(words.contains("behind its end"), "{words}");

    // Two that need it at once.
    let both: Vec<_> = ["a", "b"]
        .iter()
        .map(|vm| cloud.begin(&["vm", "activate", "base", "--name", vm, "--site", "cafe"]))
        .collect();
    for mut child in both {
        assert!(child.0.wait().unwrap().success());
    }
    cloud.guest("a").intact(0);
    cloud.guest("b").intact(0);
    let ops = cloud.ok(&["op", "list"]);
    let brought = |o: &&Value| {
        let steps = o["journal"].as_array().unwrap();
        steps.iter().any(|s| s["name"] == "bring" && s["state"] == "done")
    };
    assert_eq!(ops.as_array().unwrap().iter().filter(brought).count(), 1, "{ops}");
    let at_rest = || {
        let dirs = std::fs::read_dir(cloud.site_dir(Daemon::Ap).join("data/substrates")).unwrap();
        dirs.flatten().filter(|e| e.file_name().to_string_lossy().starts_with('.')).count()
    };
    assert_eq!(at_rest(), 0);
    cloud.kill(Daemon::Ap);
    cloud.restart(Daemon::Ap);
    let _ = cloud.ok(&["pool", "check", "--site", "cafe"]);
    cloud.guest("a").intact(0);
    let _ = cloud.ok(&["vm", "activate", "base", "--name", "c", "--site", "cafe"]);
}

#[test]
fn a_base_that_went_bad_under_a_machine_is_seen_before_it_is_docked_or_moved() {
    let images = tempfile::tempdir().unwrap();
    let dir = own_images(images.path());
    let flag = format!("--images={}", images.path().display());
    let cloud = Setup::new().flag(Daemon::Center, &flag).start();
    cloud.bring_substrate();
    let _ = cloud.ok(&["vm", "activate", "base", "--name", "a"]);
    let disk = dir.join("disk");
    let middle = std::fs::metadata(&disk).unwrap().len() / 2;
    flip(&disk, middle);
    for command in
        [&["vm", "dock", "a", "--name", "s"][..], &["vm", "migrate", "a", "--to", "cafe"]]
    {
        let words = cloud.refused(command, 1);
        assert!(words.contains(disk.to_str().unwrap()) && words.contains("damaged"), "{words}");
        assert_eq!(cloud.vm("a")["state"], "running");
        cloud.guest("a").intact(0);
    }
    let images = cloud.ok(&["image", "list", "--site", "center"]);
    let tiny = images.as_array().unwrap().iter().find(|i| i["name"] == "tiny").unwrap().clone();
    assert_eq!(tiny["built"], false, "{tiny}");
    assert!(tiny["fault"].as_str().unwrap().contains(disk.to_str().unwrap()), "{tiny}");
    flip(&disk, middle);
    let _ = cloud.ok(&["vm", "dock", "a", "--name", "s"]);
}

/// The directory below the store that holds its packs.
fn packs(store: &Path) -> PathBuf {
    let is_pack = |p: &Path| std::fs::read(p).is_ok_and(|b| b.starts_with(b"GWU1"));
    let holds =
        |d: &Path| std::fs::read_dir(d).into_iter().flatten().flatten().any(|e| is_pack(&e.path()));
    let mut dirs = vec![store.to_owned()];
    dirs.extend(
        std::fs::read_dir(store).unwrap().flatten().map(|e| e.path()).filter(|p| p.is_dir()),
    );
    dirs.into_iter().find(|d| holds(d)).expect("packs")
}
