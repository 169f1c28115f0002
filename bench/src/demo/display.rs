//! A viewer of a machine's display: an RFB connection (RFC 6143) that stays open, through
//! `godwit vm view`.

use std::net::SocketAddr;
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::mpsc;

use super::glyph::{Frame, Glyph, Patch, Update};
use super::world::World;

/// The letter that is typed, and the key that takes it away; as X11 numbers keys.
const LETTER: u32 = 'm' as u32;
const BACKSPACE: u32 = 0xff08;

/// How long a caret is watched to know where it blinks: more than one of its periods.
const BLINK: Duration = Duration::from_millis(1500);
/// Time between two key strokes into a machine of which nobody knows whether it takes any.
const STROKE: Duration = Duration::from_secs(1);
/// Time between two looks at a machine that shows no desktop yet.
const LOOK: Duration = Duration::from_millis(100);
/// How long a key may take to show on a screen that takes keys.
const SHOWN_WITHIN: Duration = Duration::from_secs(60);
/// How long connecting may take.
const CONNECT: Duration = Duration::from_secs(30);

const RAW: i32 = 0;
const DESKTOP_SIZE: i32 = -223;
/// The largest side of a screen, in pixels.
const MAX_SIDE: usize = 8192;

/// The connection and the picture that it shows.
pub(super) struct Display {
    write: OwnedWriteHalf,
    updates: mpsc::UnboundedReceiver<anyhow::Result<Update>>,
    frame: Frame,
    _view: tokio::process::Child,
}

impl Display {
    /// Connects to the display of `vm` and waits for its first picture.
    pub(super) async fn open(world: &World, vm: &str) -> anyhow::Result<Self> {
        let opened = Self::connect(world, vm);
        let opened = tokio::time::timeout(CONNECT, opened).await;
        opened.context("no display in time")?.with_context(|| format!("open the display of {vm}"))
    }

    async fn connect(world: &World, vm: &str) -> anyhow::Result<Self> {
        let mut view = world
            .cli()
            .command(&["vm", "view", vm])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .context("start `godwit vm view`")?;
        let out = view.stdout.take().context("its output")?;
        let line = BufReader::new(out).lines().next_line().await.context("read its address")?;
        let Some(line) = line else {
            let mut words = String::new();
            if let Some(mut err) = view.stderr.take() {
                let _ = err.read_to_string(&mut words).await;
            }
            bail!("`godwit vm view` failed: {}", words.trim());
        };
        let at = line.trim().trim_start_matches("vnc://");
        let at: SocketAddr = at.parse().with_context(|| format!("read the address {line:?}"))?;
        let stream = world.connect(at).context("connect to the display")?;
        stream.set_nonblocking(true).context("prepare a connection")?;
        let mut stream = TcpStream::from_std(stream).context("prepare a connection")?;
        stream.set_nodelay(true).context("prepare a connection")?;
        let (width, height) = greet(&mut stream).await?;
        let (read, mut write) = stream.into_split();
        let (tell, updates) = mpsc::unbounded_channel();
        tokio::spawn(receive(read, tell));
        ask(&mut write, false, width, height).await?;
        let frame = Frame::new(width, height);
        let mut me = Self { write, updates, frame, _view: view };
        me.next(None).await?.context("the display shows nothing")?;
        Ok(me)
    }

    /// The next update, drawn, and which pixels it changed; none when `until` passes before.
    async fn next(
        &mut self,
        until: Option<Instant>,
    ) -> anyhow::Result<Option<(Update, Vec<usize>)>> {
        let update = match until {
            Some(until) => match tokio::time::timeout_at(until.into(), self.updates.recv()).await {
                Ok(update) => update,
                Err(_) => return Ok(None),
            },
            None => self.updates.recv().await,
        };
        let update = update.context("the display was closed")??;
        let mut changed = Vec::new();
        self.frame.draw(&update, |i| changed.push(i));
        let (width, height) = (self.frame.width, self.frame.pixels.len() / self.frame.width.max(1));
        ask(&mut self.write, update.size.is_none(), width, height).await?;
        Ok(Some((update, changed)))
    }

    /// Watches for a while: which pixels change by themselves. Updates are added to `log`.
    async fn watch(
        &mut self,
        length: Duration,
        mut log: Option<&mut Vec<Update>>,
    ) -> anyhow::Result<Vec<bool>> {
        let until = Instant::now() + length;
        let mut restless = vec![false; self.frame.pixels.len()];
        while let Some((update, changed)) = self.next(Some(until)).await? {
            restless.resize(self.frame.pixels.len(), false);
            changed.into_iter().for_each(|i| restless[i] = true);
            if let Some(log) = log.as_deref_mut() {
                log.push(update);
            }
        }
        Ok(restless)
    }

    /// What it shows.
    pub(super) const fn frame(&self) -> &Frame {
        &self.frame
    }

    /// Presses a key, and draws what comes within `length`; `seen` gets each picture, and when it
    /// came.
    pub(super) async fn stroke(
        &mut self,
        key: u32,
        length: Duration,
        mut seen: impl FnMut(Instant, &Frame),
    ) -> anyhow::Result<()> {
        self.press(key).await?;
        let until = Instant::now() + length;
        while let Some((update, _)) = self.next(Some(until)).await? {
            seen(update.at, &self.frame);
        }
        Ok(())
    }

    async fn press(&mut self, key: u32) -> anyhow::Result<()> {
        let both = [key_event(key, true), key_event(key, false)];
        self.write.write_all(both.as_flattened()).await.context("press a key")
    }

    /// Lets a key go. QEMU hands a press on at once and its end 10 ms later, and drops that where the
    /// machine has stopped in between: the key is down in the guest, and repeats.
    pub(super) async fn let_go(&mut self, key: u32) -> anyhow::Result<()> {
        self.write.write_all(&key_event(key, false)).await.context("let a key go")
    }

    /// Types the letter and waits until it is on the screen, then takes it away again; gives when
    /// it was seen.
    pub(super) async fn type_letter(&mut self, glyph: &Glyph) -> anyhow::Result<Instant> {
        ensure!(glyph.off(&self.frame), "the letter is on the screen already");
        self.press(LETTER).await?;
        let until = Instant::now() + SHOWN_WITHIN;
        let seen = loop {
            let next = self.next(Some(until)).await?;
            let (update, _) = next.context("a typed letter did not come onto the screen")?;
            if glyph.on(&self.frame) {
                break update.at;
            }
        };
        self.press(BACKSPACE).await?;
        self.gone(glyph).await?;
        Ok(seen)
    }

    async fn gone(&mut self, glyph: &Glyph) -> anyhow::Result<()> {
        let until = Instant::now() + SHOWN_WITHIN;
        while !glyph.off(&self.frame) {
            self.next(Some(until)).await?.context("a letter that was deleted stays")?;
        }
        Ok(())
    }

    /// The same on a machine that is still booting: types the letter again and again until one is
    /// seen, takes all away, and learns what the letter looks like. Gives when the first one was on
    /// the screen.
    pub(super) async fn first_letter(
        &mut self,
        within: Duration,
    ) -> anyhow::Result<(Instant, Glyph)> {
        let deadline = Instant::now() + within;
        let (mut first, mut log) = (self.frame.clone(), Vec::new());
        let mut typed = 0;
        loop {
            ensure!(Instant::now() < deadline, "no typed letter was seen within {within:?}");
            if typed == 0 && !self.frame.drawn() {
                self.watch(LOOK, None).await?;
                (first, log) = (self.frame.clone(), Vec::new());
                continue;
            }
            let before = self.frame.clone();
            self.press(LETTER).await?;
            typed += 1;
            self.watch(STROKE, Some(&mut log)).await?;
            if Glyph::learn(&before, &self.frame, &[]).is_none() {
                continue;
            }
            // Those that are still under way come, too.
            self.watch(BLINK * 2, Some(&mut log)).await?;
            for _ in 0..typed + 4 {
                self.press(BACKSPACE).await?;
            }
            typed = 0;
            self.watch(BLINK * 2, None).await?;
            if let Some(glyph) = self.learn().await?
                && let Some(seen) = glyph.first_seen(&first, &log)
            {
                return Ok((seen, glyph));
            }
        }
    }

    /// Learns the letter on a screen at rest.
    async fn learn(&mut self) -> anyhow::Result<Option<Glyph>> {
        let mut restless = self.watch(BLINK, None).await?;
        let before = self.frame.clone();
        self.press(LETTER).await?;
        self.watch(BLINK, None).await?;
        for (a, b) in restless.iter_mut().zip(self.watch(BLINK, None).await?) {
            *a |= b;
        }
        let glyph = Glyph::learn(&before, &self.frame, &restless);
        self.press(BACKSPACE).await?;
        match &glyph {
            Some(glyph) => self.gone(glyph).await?,
            None => drop(self.watch(BLINK, None).await?),
        }
        Ok(glyph)
    }
}

/// A key goes down or up (RFC 6143, 7.5.4).
fn key_event(key: u32, down: bool) -> [u8; 8] {
    let mut event = [4, u8::from(down), 0, 0, 0, 0, 0, 0];
    event[4..].copy_from_slice(&key.to_be_bytes());
    event
}

/// The handshake; gives width and height.
async fn greet(stream: &mut TcpStream) -> anyhow::Result<(usize, usize)> {
    let mut version = [0u8; 12];
    stream.read_exact(&mut version).await.context("read the protocol's version")?;
    ensure!(version.starts_with(b"RFB 003."), "this is no display");
    stream.write_all(b"RFB 003.008\n").await?;
    let kinds = stream.read_u8().await.context("read the kinds of security")?;
    let mut all = vec![0u8; kinds.into()];
    stream.read_exact(&mut all).await?;
    ensure!(all.contains(&1), "the display wants a password");
    stream.write_all(&[1]).await?;
    ensure!(stream.read_u32().await? == 0, "the display refused");
    // Shared: other viewers stay.
    stream.write_all(&[1]).await?;
    let (width, height) = (stream.read_u16().await?, stream.read_u16().await?);
    let mut rest = [0u8; 16];
    stream.read_exact(&mut rest).await?;
    let name = stream.read_u32().await?;
    ensure!(name < 4096, "a display with a name of {name} bytes");
    stream.read_exact(&mut vec![0u8; name as usize]).await?;
    // 32 bits a pixel, 0x00RRGGBB, little-endian.
    let format = [0, 0, 0, 0, 32, 24, 0, 1, 0, 255, 0, 255, 0, 255, 16, 8, 0, 0, 0, 0];
    stream.write_all(&format).await?;
    let mut encodings = vec![2, 0, 0, 2];
    for e in [RAW, DESKTOP_SIZE] {
        encodings.extend_from_slice(&e.to_be_bytes());
    }
    stream.write_all(&encodings).await?;
    Ok((width.into(), height.into()))
}

/// Asks for what has changed, or for everything.
async fn ask(
    write: &mut OwnedWriteHalf,
    changes: bool,
    width: usize,
    height: usize,
) -> anyhow::Result<()> {
    let mut request = vec![3, u8::from(changes), 0, 0, 0, 0];
    for side in [width, height] {
        request.extend_from_slice(&u16::try_from(side).unwrap_or(u16::MAX).to_be_bytes());
    }
    write.write_all(&request).await.context("ask the display for a picture")
}

async fn receive(read: OwnedReadHalf, tell: mpsc::UnboundedSender<anyhow::Result<Update>>) {
    let mut read = BufReader::with_capacity(256 << 10, read);
    loop {
        let update = message(&mut read).await;
        let over = update.is_err();
        let Some(update) = update.transpose() else { continue };
        if tell.send(update).is_err() || over {
            return;
        }
    }
}

/// The next message; an update, or something that is of no use here.
async fn message(read: &mut (impl AsyncReadExt + Unpin)) -> anyhow::Result<Option<Update>> {
    match read.read_u8().await.context("read from the display")? {
        0 => {}
        2 => return Ok(None),
        3 => {
            let mut rest = [0u8; 7];
            read.read_exact(&mut rest).await?;
            let length = u32::from_be_bytes([rest[3], rest[4], rest[5], rest[6]]);
            ensure!(length < 1 << 20, "a clipboard of {length} bytes");
            read.read_exact(&mut vec![0u8; length as usize]).await?;
            return Ok(None);
        }
        other => bail!("a message of the unknown kind {other}"),
    }
    read.read_u8().await?;
    let (mut patches, mut size) = (Vec::new(), None);
    for _ in 0..read.read_u16().await? {
        let mut side = [0usize; 4];
        for s in &mut side {
            *s = read.read_u16().await?.into();
        }
        let [x, y, width, height] = side;
        match read.read_i32().await? {
            RAW => {
                ensure!(width <= MAX_SIDE && height <= MAX_SIDE, "a picture too large");
                let mut bytes = vec![0u8; width * height * 4];
                read.read_exact(&mut bytes).await?;
                let value = |p: &[u8]| u32::from_le_bytes([p[0], p[1], p[2], 0]);
                let pixels = bytes.chunks_exact(4).map(value).collect();
                patches.push(Patch { x, y, width, pixels });
            }
            DESKTOP_SIZE => {
                ensure!(width <= MAX_SIDE && height <= MAX_SIDE, "a screen too large");
                size = Some((width, height));
            }
            other => bail!("an encoding that was not asked for: {other}"),
        }
    }
    Ok(Some(Update { at: Instant::now(), patches, size }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn messages_are_read_as_the_protocol_writes_them() {
        let mut raw = vec![2];
        raw.extend_from_slice(&[3, 0, 0, 0, 0, 0, 0, 2, b'h', b'i']);
        raw.extend_from_slice(&[0, 0, 0, 2]);
        raw.extend_from_slice(&[0, 5, 0, 6, 0, 2, 0, 1, 0, 0, 0, 0]);
        raw.extend_from_slice(&[0x33, 0x22, 0x11, 0xff, 1, 0, 0, 0]);
        raw.extend_from_slice(&[0, 0, 0, 0, 3, 32, 2, 88, 0xff, 0xff, 0xff, 0x21]);
        let mut read = raw.as_slice();
        assert!(message(&mut read).await.expect("a bell").is_none());
        assert!(message(&mut read).await.expect("a clipboard").is_none());
        let update = message(&mut read).await.expect("read").expect("an update");
        let patch = Patch { x: 5, y: 6, width: 2, pixels: vec![0x11_22_33, 1] };
        assert_eq!((update.patches, update.size), (vec![patch], Some((800, 600))));
        assert!(message(&mut [9u8].as_slice()).await.is_err());
        let odd = [0, 0, 0, 1, 0, 0, 0, 0, 0, 1, 0, 1, 0, 0, 0, 7];
        assert!(message(&mut odd.as_slice()).await.is_err());
    }
}
