//! Building for real: the tiny guest from Debian's packages, and what may go wrong with an image.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::time::Duration;

use godwit_image::{Image, ImageCache, ImageError, Progress, Stage};
use godwit_types::{Code, CodedError as _, Name};

/// Packages are fetched once for all tests and all runs.
fn cache(dir: &Path) -> ImageCache {
    let downloads = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("downloads");
    ImageCache::open(dir).expect("a cache").with_downloads(&downloads).expect("downloads")
}

fn name(text: &str) -> Name {
    Name::new(text).expect("a valid name")
}

/// Paths in an initial RAM disk.
fn contents(initrd: &Path) -> String {
    let file = std::fs::File::open(initrd).expect("there");
    let out = Command::new("cpio")
        .args(["-it", "--quiet"])
        .stdin(Stdio::from(file))
        .output()
        .expect("cpio is installed");
    assert!(out.status.success());
    String::from_utf8(out.stdout).expect("utf-8")
}

#[tokio::test]
async fn tiny_is_built_once_found_by_name_and_checked() {
    let dir = tempfile::tempdir().expect("temp dir");
    let cache = cache(dir.path());
    let tiny = name("tiny");
    assert_eq!(cache.get(&tiny).expect_err("not built").code(), Code::NotFound);

    let seen = Mutex::new(Vec::<Progress>::new());
    let image = cache
        .build(&tiny, |p| seen.lock().expect("not poisoned").push(p))
        .await
        .expect("tiny is built");
    let seen = seen.into_inner().expect("not poisoned");
    assert_eq!(seen.last().map(|p| p.stage), Some(Stage::Done));
    for stage in [Stage::Installing, Stage::Compiling, Stage::Writing, Stage::Publishing] {
        assert!(seen.iter().any(|p| p.stage == stage), "no report of {stage:?}");
    }
    assert!(seen.iter().all(|p| p.fraction.is_none_or(|f| (0.0..=1.0).contains(&f))));

    image.verify().expect("whole");
    let inside = contents(&image.initrd_path().expect("it has one"));
    for wanted in [
        "init",
        "bin/busybox",
        "usr/sbin/qemu-ga",
        "lib64/ld-linux-x86-64.so.2",
        "lib/libc.so.6",
        "lib/modules/order",
        "lib/modules/virtio_blk.ko",
        "usr/lib/godwit/before-dock",
        "usr/lib/godwit/after-activate",
        "usr/lib/godwit/godwit-witness",
    ] {
        assert!(inside.lines().any(|l| l == wanted), "{wanted} is missing");
    }

    // The second time nothing is done, and another cache object finds it too.
    let again = cache
        .build(&tiny, |p| assert_eq!(p.stage, Stage::Done, "{p:?}"))
        .await
        .expect("it is there");
    assert_eq!(again, image);
    let listed = ImageCache::open(dir.path()).expect("a cache").list().expect("readable");
    assert_eq!(listed, std::slice::from_ref(&image));

    // A flipped bit on the base image is named.
    let disk = image.disk_path().expect("it has one");
    let mut bytes = std::fs::read(&disk).expect("readable");
    bytes[1 << 20] ^= 1;
    std::fs::remove_file(&disk).expect("removable");
    std::fs::write(&disk, bytes).expect("writable");
    let error = image.verify().expect_err("damaged");
    assert!(matches!(&error, ImageError::Damaged { path, .. } if *path == disk), "{error}");
    assert_eq!(error.code(), Code::Damaged);

    // A truncated file is seen when the image is opened.
    std::fs::write(&disk, "short").expect("writable");
    assert_eq!(Image::open(image.dir()).expect_err("truncated").code(), Code::Damaged);
    assert!(cache.list().expect("readable").is_empty());
}

#[tokio::test]
async fn a_build_that_is_given_up_leaves_nothing_half_done() {
    let dir = tempfile::tempdir().expect("temp dir");
    let cache = cache(dir.path());
    let tiny = name("tiny");
    let (sender, mut receiver) = tokio::sync::mpsc::unbounded_channel();
    {
        let building = cache.build(&tiny, move |p| {
            let _ = sender.send(p.stage);
        });
        tokio::pin!(building);
        let installing = async {
            loop {
                tokio::select! {
                    done = &mut building => panic!("it was to be given up before its end: {done:?}"),
                    stage = receiver.recv() => if stage == Some(Stage::Installing) { break },
                }
            }
        };
        let in_time = tokio::time::timeout(Duration::from_secs(300), installing).await;
        in_time.expect("a package is installed in time");
    }
    assert!(matches!(cache.get(&tiny), Err(ImageError::NotBuilt { .. })));
    assert!(cache.list().expect("readable").is_empty());
    let left = |dir: &str| std::fs::read_dir(cache.dir().join(dir)).expect("readable").count();
    assert_eq!(left("by-hash"), 0);
    assert_eq!(left("work"), 1, "only the lock");
}

#[tokio::test]
async fn an_unknown_image_is_refused() {
    let dir = tempfile::tempdir().expect("temp dir");
    let error = cache(dir.path()).build(&name("windows"), |_| {}).await.expect_err("no recipe");
    assert_eq!(error.code(), Code::NotFound);
    assert!(error.to_string().contains("tiny-arm64"), "{error}");
}
