//! Disk post-copy end to end: QEMU's NBD client reads while the source pushes.
#![allow(missing_docs)]

mod common;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use common::{MIB, base, qemu_io, run, s, same};
use godwit_disk::image::{self, Backing};
use godwit_disk::{
    BitmapParts, BlockSource, DiskMsg, FrozenChain, MidLayer, NbdServer, PostcopyDestination,
    RemoteDisk, SourceDisk,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio_util::sync::CancellationToken;

const DEADLINE: Duration = Duration::from_secs(120);

async fn put(to: &mut (impl AsyncWriteExt + Unpin), m: &DiskMsg) -> std::io::Result<()> {
    let data = m.encode().map_err(std::io::Error::other)?;
    to.write_u32(data.len() as u32).await?;
    to.write_all(&data).await
}

async fn get(from: &mut (impl AsyncReadExt + Unpin)) -> std::io::Result<DiskMsg> {
    let mut data = vec![0; from.read_u32().await? as usize];
    from.read_exact(&mut data).await?;
    DiskMsg::decode(&data).map_err(std::io::Error::other)
}

/// Runs the source's end of a link until it breaks.
async fn source_end(disk: Arc<SourceDisk>, link: DuplexStream, push: bool) {
    let (mut rx, mut tx) = tokio::io::split(link);
    let sending = async {
        loop {
            let m = if push { disk.next_any().await } else { disk.next_demanded().await };
            if put(&mut tx, &m.expect("the chain reads")).await.is_err() {
                return;
            }
        }
    };
    let receiving = async {
        while let Ok(m) = get(&mut rx).await {
            disk.handle(m).expect("a sound peer");
        }
    };
    tokio::select! { () = sending => (), () = receiving => () }
}

/// Runs the destination's end of a link until it breaks or everything is here.
async fn destination_end(disk: Arc<RemoteDisk>, link: DuplexStream) {
    let (mut rx, mut tx) = tokio::io::split(link);
    let receiving = async {
        while let Ok(m) = get(&mut rx).await {
            disk.handle(m).await.expect("a sound peer");
        }
    };
    let sending = async {
        loop {
            let m = tokio::select! {
                m = disk.next_message() => m,
                () = disk.wait_complete() => match disk.finished().await.expect("durable") {
                    Some(done) => done,
                    None => disk.next_message().await,
                },
            };
            if put(&mut tx, &m).await.is_err() {
                return;
            }
        }
    };
    tokio::select! { () = sending => (), () = receiving => () }
}

/// Tells the offset of each read once it is answered.
struct Watched {
    disk: Arc<RemoteDisk>,
    answered: tokio::sync::mpsc::UnboundedSender<u64>,
}

impl BlockSource for Watched {
    fn bytes(&self) -> u64 {
        self.disk.bytes()
    }

    async fn read(&self, offset: u64, len: usize) -> std::io::Result<Vec<u8>> {
        let data = self.disk.read(offset, len).await;
        let _ = self.answered.send(offset);
        data
    }
}

struct Site {
    dir: tempfile::TempDir,
    chain: Arc<FrozenChain>,
}

impl Site {
    fn at(&self, n: &str) -> PathBuf {
        self.dir.path().join(n)
    }
}

/// A base of 16 MiB and a cow image with some 5 MiB in it.
fn site() -> Site {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let at = |n: &str| dir.path().join(n);
    base(&at("base.raw"), 16);
    image::create_overlay(&at("cow.qcow2"), Backing::Raw(&at("base.raw")), 16 * MIB).expect("cow");
    qemu_io(
        &at("cow.qcow2"),
        "qcow2",
        &["write -P 33 1M 2M", "write -z 6M 1M", "write -P 44 9000k 1M", "write -P 55 15M 1M"],
    );
    let chain = FrozenChain::open(&at("base.raw"), &[at("cow.qcow2")]).expect("opens");
    Site { chain: Arc::new(chain), dir }
}

fn destination(site: &Site, source: &SourceDisk) -> Arc<RemoteDisk> {
    let mut parts = BitmapParts::default();
    let mut bitmap = None;
    for m in source.greeting() {
        let DiskMsg::Bitmap(part) = m else { panic!("a bitmap comes first") };
        bitmap = parts.take(&part).expect("in order");
    }
    let bitmap = bitmap.expect("whole");
    let mid = MidLayer::create(&site.at("mid.qcow2"), &site.at("base.raw"), 16 * MIB, &bitmap);
    Arc::new(RemoteDisk::new(mid.expect("new"), PostcopyDestination::new(bitmap)))
}

fn serve(disk: &Arc<RemoteDisk>, socket: &Path) -> CancellationToken {
    let stop = CancellationToken::new();
    let server = NbdServer::bind(socket, "remote").expect("listens");
    tokio::spawn(server.serve(Arc::clone(disk), stop.clone()));
    stop
}

fn url(socket: &Path) -> String {
    format!("nbd+unix:///remote?socket={}", s(socket))
}

async fn tool(tool: &'static str, args: Vec<String>) -> String {
    let work = tokio::task::spawn_blocking(move || {
        run(tool, &args.iter().map(String::as_str).collect::<Vec<_>>())
    });
    tokio::time::timeout(DEADLINE, work).await.expect("in time").expect("no panic")
}

#[tokio::test(flavor = "multi_thread")]
async fn qemu_reads_the_whole_disk_while_it_is_pushed() {
    let site = site();
    let source =
        Arc::new(SourceDisk::new(Arc::clone(&site.chain), site.chain.allocation().expect("maps")));
    let total = source.left();
    let disk = destination(&site, &source);
    let socket = site.at("s");
    let stop = serve(&disk, &socket);
    let (a, b) = tokio::io::duplex(128 << 10);
    let ends = [
        tokio::spawn(source_end(Arc::clone(&source), a, true)),
        tokio::spawn(destination_end(Arc::clone(&disk), b)),
    ];
    let info = tool("qemu-img", vec!["info".into(), url(&socket)]).await;
    assert!(info.contains("16 MiB"), "{info}");
    let cow = s(&site.at("cow.qcow2"));
    let args = ["compare", "-f", "raw", "-F", "qcow2", &url(&socket), &cow];
    tool("qemu-img", args.map(String::from).to_vec()).await;
    tokio::time::timeout(DEADLINE, source.wait_released()).await.expect("released");
    let counts = source.counts();
    assert_eq!(counts.pulled + counts.pushed, total, "each block once: {counts:?}");
    stop.cancel();
    let mid = disk.seal().await.expect("seals");
    for e in ends {
        e.abort();
    }
    same((&mid, "qcow2"), (&site.at("cow.qcow2"), "qcow2"));
    run("qemu-img", &["check", &s(&mid)]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_waiting_pull_holds_up_no_read_of_present_blocks() {
    let site = site();
    let map = site.chain.allocation().expect("maps");
    let source = Arc::new(SourceDisk::new(Arc::clone(&site.chain), map));
    let disk = destination(&site, &source);
    // No link at all: block 256 (1 MiB) can't come, block 0 is in the base.
    let stuck = tokio::spawn({
        let disk = Arc::clone(&disk);
        async move { disk.read(MIB, 4096).await }
    });
    let socket = site.at("s");
    let (answered, mut answers) = tokio::sync::mpsc::unbounded_channel();
    let watched = Arc::new(Watched { disk: Arc::clone(&disk), answered });
    let stop = CancellationToken::new();
    let server = NbdServer::bind(&socket, "remote").expect("listens");
    tokio::spawn(server.serve(watched, stop.clone()));
    // Over one connection: a read that must wait, then one that need not.
    let args = ["-r", "-f", "raw", "-c", "aio_read -P 33 1M 4k", "-c", "read 8M 4k"];
    let mut args = args.map(String::from).to_vec();
    args.extend(["-c".into(), "aio_flush".into(), url(&socket)]);
    let io = tokio::spawn(tool("qemu-io", args));
    let first = tokio::time::timeout(DEADLINE, answers.recv()).await.expect("in time");
    assert_eq!(first, Some(8 * MIB), "the block of the base is answered first");
    assert!(!stuck.is_finished() && !io.is_finished());
    let (a, b) = tokio::io::duplex(128 << 10);
    tokio::spawn(source_end(Arc::clone(&source), a, false));
    tokio::spawn(destination_end(Arc::clone(&disk), b));
    io.await.expect("qemu-io read the pattern");
    assert_eq!(answers.recv().await, Some(MIB));
    let data = stuck.await.expect("no panic").expect("reads");
    assert!(data.iter().all(|b| *b == 33));
    assert_eq!(source.counts().pushed, 0, "pulls alone");
    stop.cancel();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_destination_goes_on_from_its_record() {
    let site = site();
    let map = site.chain.allocation().expect("maps");
    let source = Arc::new(SourceDisk::new(Arc::clone(&site.chain), map.clone()));
    let disk = destination(&site, &source);
    let (a, b) = tokio::io::duplex(32 << 10);
    let ends = [
        tokio::spawn(source_end(Arc::clone(&source), a, false)),
        tokio::spawn(destination_end(Arc::clone(&disk), b)),
    ];
    for at in [MIB, 6 * MIB] {
        tokio::time::timeout(DEADLINE, disk.read(at, 64 << 10))
            .await
            .expect("comes")
            .expect("reads");
    }
    disk.flush().await.expect("durable");
    tokio::time::timeout(DEADLINE, disk.read(15 * MIB, 4096)).await.expect("comes").expect("reads");
    for e in ends {
        e.abort();
        let _ = e.await;
    }
    // As after kill -9: nothing that the process still held is written.
    std::mem::forget(disk);
    source.link_lost();

    let (mid, base) = (site.at("mid.qcow2"), site.at("base.raw"));
    let resumed = tokio::task::spawn_blocking(move || MidLayer::resume(&mid, &base));
    let resumed = resumed.await.expect("no panic").expect("resumes");
    assert_eq!(resumed.received.count(), 32);
    let core = PostcopyDestination::resume(resumed.sent, &resumed.received).expect("one disk");
    let disk = Arc::new(RemoteDisk::new(resumed.layer, core));
    let (a, b) = tokio::io::duplex(128 << 10);
    tokio::spawn(source_end(Arc::clone(&source), a, true));
    tokio::spawn(destination_end(Arc::clone(&disk), b));
    tokio::time::timeout(DEADLINE, source.wait_released()).await.expect("released");
    let counts = source.counts();
    assert!(counts.pushed + counts.pulled <= map.count() + 1, "only one block twice: {counts:?}");
    let mid = disk.seal().await.expect("seals");
    same((&mid, "qcow2"), (&site.at("cow.qcow2"), "qcow2"));
}

/// Speaks to a server as no client of QEMU would.
#[tokio::test(flavor = "multi_thread")]
async fn hostile_nbd_clients_are_refused() {
    let site = site();
    let map = site.chain.allocation().expect("maps");
    let source = Arc::new(SourceDisk::new(Arc::clone(&site.chain), map));
    let disk = destination(&site, &source);
    let socket = site.at("s");
    let stop = serve(&disk, &socket);
    let connect = || async {
        let mut c = tokio::net::UnixStream::connect(&socket).await.expect("connects");
        let mut greeting = [0; 18];
        c.read_exact(&mut greeting).await.expect("greets");
        assert_eq!(&greeting[..16], b"NBDMAGICIHAVEOPT");
        c
    };
    // Flags that are not known, an option without end, an unknown export: each is hung up on.
    let option = |kind: u32, len: u32| {
        [&3u32.to_be_bytes()[..], b"IHAVEOPT", &kind.to_be_bytes(), &len.to_be_bytes()].concat()
    };
    let unknown = [&option(1, 3)[..], b"abc"].concat();
    for bad in [vec![0xff; 4], option(7, u32::MAX), unknown] {
        let mut c = connect().await;
        c.write_all(&bad).await.expect("sends");
        let ended = tokio::time::timeout(DEADLINE, c.read_u8()).await.expect("in time");
        assert!(ended.is_err(), "{bad:?}");
    }
    // In transmission: a read past the end and a write are refused, and the next still works.
    let mut c = connect().await;
    c.write_all(&option(1, 0)).await.expect("sends");
    let mut export = [0; 10];
    c.read_exact(&mut export).await.expect("begins");
    assert_eq!(export[..8], (16 * MIB).to_be_bytes());
    let request = |kind: u16, cookie: u64, offset: u64, len: u32| {
        let mut r = 0x2560_9513u32.to_be_bytes().to_vec();
        r.extend([0, 0]);
        r.extend(kind.to_be_bytes());
        r.extend(cookie.to_be_bytes());
        r.extend(offset.to_be_bytes());
        r.extend(len.to_be_bytes());
        r
    };
    let write = [&request(1, 4, 0, 8)[..], &[9; 8]].concat();
    let cases = [
        (request(0, 1, u64::MAX, 4096), 22, 0),
        (request(0, 2, 16 * MIB - 1, 2), 22, 0),
        (request(0, 3, 0, u32::MAX), 22, 0),
        (write, 1, 0),
        (request(77, 5, 0, 1), 22, 0),
        (request(0, 6, 4095, 3), 0, 3),
    ];
    for (i, (bytes, error, data)) in cases.into_iter().enumerate() {
        c.write_all(&bytes).await.expect("sends");
        assert_eq!(c.read_u32().await.expect("answers"), 0x6744_6698);
        assert_eq!(c.read_u32().await.expect("answers"), error, "request {i}");
        assert_eq!(c.read_u64().await.expect("answers"), i as u64 + 1);
        let mut skip = vec![0; data];
        c.read_exact(&mut skip).await.expect("answers");
    }
    stop.cancel();
    assert!(c.read_u8().await.is_err(), "the server is gone");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_write_needs_no_pull_and_no_push_overwrites_it() {
    let site = site();
    let map = site.chain.allocation().expect("maps");
    let source = Arc::new(SourceDisk::new(Arc::clone(&site.chain), map));
    let total = source.left();
    let disk = destination(&site, &source);
    let socket = site.at("s");
    let stop = serve(&disk, &socket);
    let top = site.at("top.qcow2");
    image::create_overlay(&top, Backing::None, 16 * MIB).expect("top");
    let opts = format!(
        "driver=qcow2,file.driver=file,file.filename={},backing.driver=nbd,\
         backing.server.type=unix,backing.server.path={},backing.export=remote",
        s(&top),
        s(&socket)
    );
    // There is no link: a write of whole blocks must not need one.
    let args = ["--image-opts", "-c", "write -P 200 1M 8k", "-c", "write -P 201 15M 4k", &opts];
    tool("qemu-io", args.map(String::from).to_vec()).await;
    // The first write is known before its block is sent, the second crosses its push.
    disk.written(256..258);
    let (a, b) = tokio::io::duplex(128 << 10);
    tokio::spawn(destination_end(Arc::clone(&disk), b));
    tokio::spawn({
        let (source, disk) = (Arc::clone(&source), Arc::clone(&disk));
        async move {
            let (mut rx, mut tx) = tokio::io::split(a);
            source.handle(get(&mut rx).await.expect("the syn")).expect("sound");
            while source.left() > 0 {
                let m = source.next_any().await.expect("reads");
                put(&mut tx, &m).await.expect("sends");
            }
            disk.written(3840..3841);
            while let Ok(m) = get(&mut rx).await {
                source.handle(m).expect("sound");
            }
        }
    });
    tokio::time::timeout(DEADLINE, source.wait_released()).await.expect("released");
    let counts = source.counts();
    assert_eq!((counts.cancelled, counts.pulled), (2, 0));
    assert_eq!(counts.pushed, total - 2);
    stop.cancel();
    let mid = disk.seal().await.expect("seals");

    // `top` on `mid` is what the guest would see had it never moved.
    run("qemu-img", &["rebase", "-u", "-f", "qcow2", "-F", "qcow2", "-b", &s(&mid), &s(&top)]);
    let cow = site.at("cow.qcow2");
    qemu_io(&cow, "qcow2", &["write -P 200 1M 8k", "write -P 201 15M 4k"]);
    same((&top, "qcow2"), (&cow, "qcow2"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sender_that_goes_away_loses_no_blocks() {
    let site = site();
    let map = site.chain.allocation().expect("maps");
    let source = SourceDisk::new(Arc::clone(&site.chain), map.clone());
    let mut sent = godwit_disk::BlockBitmap::new(map.blocks()).expect("small");
    let mut dropped = 0;
    loop {
        // Give up on the first reads while they are under way.
        let mut next = Box::pin(source.next_any());
        let msg = match futures::poll!(&mut next) {
            std::task::Poll::Ready(msg) => msg,
            std::task::Poll::Pending if dropped < 20 => {
                dropped += 1;
                continue;
            }
            std::task::Poll::Pending => next.await,
        };
        match msg.expect("reads") {
            DiskMsg::Push(run) => sent.set_range(run.range().blocks()),
            DiskMsg::Done => break,
            m => panic!("{m:?} was not asked for"),
        }
    }
    assert!(dropped > 0);
    assert_eq!(sent, map);
    assert_eq!(source.counts().pushed, map.count());
}
