//! The preempt channel of the destination's QEMU, and how it is seen that QEMU has taken what is on it.
//!
//! QEMU reads the channel on a thread of its own, into a buffer that it fills when it lacks bytes. So
//! once its socket is empty, all that was written is in that buffer or done with; and the next byte
//! that is written leaves the socket only when the thread has done with all before it. Every record
//! begins with the same byte, the highest of an address: it is written ahead, and left out of the record
//! that follows, if there is one. The source's last word on the channel would end that thread, and is not
//! passed on: at the end of the main channel QEMU ends it itself.

use std::os::fd::{AsFd, BorrowedFd};
use std::path::PathBuf;
use std::time::Duration;

use godwit_qemu::stream::flags;
use rustix::ioctl;
use tokio::io::AsyncWriteExt;
use tokio::net::UnixStream;
use tokio::sync::Mutex;

use super::RelayError;
use super::core::Channel;
use super::passing::{Passing, Reader};

/// How long QEMU may take to read what it was given.
const WITHIN: Duration = Duration::from_secs(10);
/// How often its socket is looked at: nothing wakes whoever waits for a socket to be empty.
const LOOK_EVERY: Duration = Duration::from_millis(1);
/// How long QEMU may take to say what its end is, once it has shut a channel.
const LAST_WORDS: Duration = Duration::from_secs(10);
/// The first byte of every record: addresses are below 2^56.
const BEGIN: u8 = 0;
/// The source's last word: a record that ends the channel (`RAM_SAVE_FLAG_EOS`).
const END: [u8; 8] = (flags::EOS as u64).to_be_bytes();

/// The channel. QEMU tells its channels apart by order, and the main one is open by then.
#[derive(Debug)]
pub(crate) struct Preempt {
    qemu: PathBuf,
    open: Mutex<Option<Open>>,
}

#[derive(Debug)]
struct Open {
    stream: UnixStream,
    reader: Reader,
    /// The first byte of the next record is written.
    begun: bool,
    /// A page was written: before the switch there is none, and QEMU does not read.
    pages: bool,
}

impl Preempt {
    /// Not open yet, of the QEMU that listens at that path.
    pub(crate) fn new(qemu: PathBuf) -> Self {
        Self { qemu, open: Mutex::new(None) }
    }

    /// Writes `raw` to QEMU, with the channel opened before if it is the first; `before` is shown what is
    /// about to be written.
    ///
    /// # Errors
    /// [`RelayError::Socket`] and [`RelayError::Qemu`]; [`RelayError::Protocol`] for an address that no
    /// page has.
    pub(crate) async fn write(
        &self,
        raw: &[u8],
        before: impl FnOnce(&Passing),
    ) -> Result<Passing, RelayError> {
        let mut open = self.open.lock().await;
        let open = match &mut *open {
            Some(open) => open,
            None => {
                let stream = UnixStream::connect(&self.qemu).await;
                let stream = stream.map_err(|source| RelayError::Socket {
                    what: "opening the preempt channel of the waiting QEMU at",
                    path: self.qemu.clone(),
                    source,
                })?;
                let reader = Reader::new(Channel::Preempt, false);
                open.insert(Open { stream, reader, begun: false, pages: false })
            }
        };
        let passing = open.reader.read(raw);
        before(&passing);
        if !passing.pages.is_empty() {
            godwit_hold::at("relay.demanded").await;
            open.pages = true;
        }
        let mut left = raw;
        if passing.ends {
            left = raw.strip_suffix(&END).ok_or(RelayError::Protocol("pages behind their end"))?;
        }
        if open.begun
            && let [first, rest @ ..] = left
        {
            if *first != BEGIN {
                return Err(RelayError::Protocol("a page beyond the end of all memory"));
            }
            (open.begun, left) = (false, rest);
        }
        if let Err(error) = open.stream.write_all(left).await {
            return Err(ended(error).await);
        }
        Ok(passing)
    }

    /// Waits until QEMU has done with all that was written.
    ///
    /// # Errors
    /// [`RelayError::NotTaken`] when it does not read; [`RelayError::Qemu`].
    pub(crate) async fn taken(&self) -> Result<(), RelayError> {
        let all = async {
            // Whoever writes waits for QEMU, too.
            let mut open = self.open.lock().await;
            let Some(open) = open.as_mut().filter(|open| open.pages) else { return Ok(()) };
            empty(&open.stream).await?;
            if !open.begun && open.reader.is_between_records() {
                open.stream.write_all(&[BEGIN]).await?;
                open.begun = true;
                empty(&open.stream).await?;
            }
            Ok(())
        };
        match tokio::time::timeout(WITHIN, all).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => Err(ended(error).await),
            Err(_) => Err(RelayError::NotTaken),
        }
    }
}

/// Waits until the other end has read all of a socket.
async fn empty(stream: &UnixStream) -> std::io::Result<()> {
    while unread(stream.as_fd())? > 0 {
        tokio::time::sleep(LOOK_EVERY).await;
    }
    Ok(())
}

/// What the other end of a unix socket has not read yet, as the kernel accounts for it.
fn unread(socket: BorrowedFd<'_>) -> std::io::Result<i32> {
    // SAFETY: SIOCOUTQ (the number of TIOCOUTQ) writes one C int to where it is pointed.
    let got = unsafe {
        let outq = ioctl::Getter::<{ libc::TIOCOUTQ as ioctl::Opcode }, libc::c_int>::new();
        ioctl::ioctl(socket, outq)
    };
    Ok(got?)
}

/// What a failed write to the channel means. QEMU shuts it as soon as it has all of memory, while the
/// source's last word on it (which has no page in it any more) may still be on its way: so the return
/// path says what happened, and this is the failure only if it says nothing.
async fn ended(source: std::io::Error) -> RelayError {
    if matches!(source.kind(), std::io::ErrorKind::BrokenPipe | std::io::ErrorKind::ConnectionReset)
    {
        tokio::time::sleep(LAST_WORDS).await;
    }
    RelayError::Qemu { what: "writing the destination QEMU's preempt channel", source }
}

#[cfg(test)]
mod tests {
    use godwit_qemu::stream::Record;
    use tokio::io::AsyncReadExt;
    use tokio::net::UnixListener;

    use super::super::passing::tests::{encoded, page};
    use super::*;

    /// A channel and the end of it that QEMU has.
    async fn channel(first: &[u8]) -> (tempfile::TempDir, Preempt, UnixStream) {
        let dir = tempfile::tempdir().expect("a directory");
        let listener = UnixListener::bind(dir.path().join("qemu")).expect("bound");
        let preempt = Preempt::new(dir.path().join("qemu"));
        preempt.taken().await.expect("nothing was written");
        preempt.write(first, |_| {}).await.expect("written");
        let (qemu, _) = listener.accept().await.expect("opened");
        (dir, preempt, qemu)
    }

    #[tokio::test]
    async fn it_is_taken_when_qemu_lacks_the_next_record() {
        let record = encoded(&[page("m0", 3)]);
        let (_dir, preempt, mut qemu) = channel(&record).await;
        let taken = preempt.taken();
        tokio::pin!(taken);
        let pending = |what| async move { panic!("{what}") };
        // In the socket.
        tokio::select! {
            _ = &mut taken => pending("nobody has read it").await,
            () = tokio::time::sleep(Duration::from_millis(50)) => {}
        }
        // In QEMU's buffer: what it does with it nobody sees.
        let mut read = vec![0; record.len()];
        qemu.read_exact(&mut read).await.expect("read");
        tokio::select! {
            _ = &mut taken => pending("it may be at work on it").await,
            () = tokio::time::sleep(Duration::from_millis(50)) => {}
        }
        // It wants more.
        let mut next = vec![0; 1];
        qemu.read_exact(&mut next).await.expect("read");
        taken.await.expect("done");
        preempt.taken().await.expect("still");
        // A page that it asks for later is whole.
        preempt
            .write(&record, |passing| assert_eq!(passing.pages.len(), 1))
            .await
            .expect("written");
        next.resize(record.len(), 0);
        qemu.read_exact(&mut next[1..]).await.expect("read");
        assert_eq!((&read, &next), (&record, &record));
    }

    #[tokio::test]
    async fn the_last_word_does_not_end_the_thread_that_is_still_at_work() {
        let record = encoded(&[page("m0", 3)]);
        let (_dir, preempt, mut qemu) = channel(&encoded(&[page("m0", 3), Record::Eos])).await;
        let mut taken = Box::pin(preempt.taken());
        let mut read = vec![0; record.len()];
        qemu.read_exact(&mut read).await.expect("read");
        tokio::select! {
            _ = &mut taken => panic!("it may be at work on it"),
            () = tokio::time::sleep(Duration::from_millis(50)) => {}
        }
        qemu.read_exact(&mut read[..1]).await.expect("read");
        taken.await.expect("done");
        drop(preempt);
        assert_eq!(qemu.read(&mut read).await.expect("read"), 0, "nothing more was written");
    }

    #[tokio::test]
    async fn pages_behind_the_last_word_are_refused() {
        let (_dir, preempt, _qemu) = channel(&encoded(&[page("m0", 3)])).await;
        let wrong = encoded(&[Record::Eos, page("m0", 4)]);
        let error = preempt.write(&wrong, |_| {}).await.expect_err("refused");
        assert!(matches!(error, RelayError::Protocol(_)), "{error}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_qemu_that_does_not_read_is_an_error() {
        let (_dir, preempt, _qemu) = channel(&encoded(&[page("m0", 3)])).await;
        let error = preempt.taken().await.expect_err("unread");
        assert!(matches!(error, RelayError::NotTaken), "{error}");
    }

    #[tokio::test]
    async fn an_address_beyond_all_memory_is_refused_once_it_was_begun() {
        let record = encoded(&[page("m0", 3)]);
        let (_dir, preempt, mut qemu) = channel(&record).await;
        let reads = async {
            let mut read = vec![0; record.len() + 1];
            qemu.read_exact(&mut read).await.expect("read");
        };
        let (taken, ()) = tokio::join!(preempt.taken(), reads);
        taken.expect("all is read");
        let error = preempt.write(&[1; 16], |_| {}).await.expect_err("refused");
        assert!(matches!(error, RelayError::Protocol(_)), "{error}");
    }

    /// As a move of an idle machine showed once in a thousand.
    #[tokio::test(start_paused = true)]
    async fn a_channel_that_qemu_has_shut_is_for_the_return_path_to_explain() {
        let (mut near, far) = UnixStream::pair().expect("a pair");
        drop(far);
        let error = near.write_all(b"the last word").await.expect_err("shut");
        let began = tokio::time::Instant::now();
        let back = async { "all of memory has come" };
        let first = tokio::select! {
            biased;
            why = ended(error) => panic!("the move ends with: {why}"),
            back = back => back,
        };
        assert_eq!((first, began.elapsed()), ("all of memory has come", Duration::ZERO));
        // A QEMU that says nothing does not hold the move up for good.
        let error = ended(std::io::ErrorKind::BrokenPipe.into()).await;
        assert!(error.in_full().contains("preempt channel"), "{}", error.in_full());
        assert_eq!(began.elapsed(), LAST_WORDS);
        let other = ended(std::io::ErrorKind::InvalidInput.into()).await;
        assert!(other.in_full().contains("preempt channel"));
        assert_eq!(began.elapsed(), LAST_WORDS);
    }
}
