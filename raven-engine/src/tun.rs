//! A queue of the TUN device: packets of the node's stack, and packets for it.

use std::{
    fs::File,
    io::{self, IoSlice, Read, Write},
    os::fd::{AsFd, BorrowedFd},
};

use nix::errno::Errno;
use tun_rs::{DeviceBuilder, Layer, SyncDevice};

use crate::offload::{self, Header};

/// The longest aggregate in bytes, with its virtio header.
pub(crate) const BUFFER: usize = offload::LENGTH + 65_535;

/// A TUN device with one queue per worker.
pub(crate) struct Tun {
    /// Kept for its settings.
    device: SyncDevice,
    /// True if the kernel divides and joins UDP, too (Linux 6.2).
    pub(crate) udp: bool,
}

impl Tun {
    /// Opens the device, which is created if it does not exist, and its queues. A persistent device outlives them.
    pub(crate) fn open(name: &str, queues: usize, persistent: bool) -> io::Result<(Self, Vec<Queue>)> {
        let device = DeviceBuilder::new()
            .name(name)
            .layer(Layer::L3)
            .offload(true)
            .multi_queue(true)
            // The agent sets it up.
            .inherit_enable_state()
            .build_sync()?;
        if persistent {
            device.persist()?;
        }
        device.set_nonblocking(true)?;
        let mut opened = vec![Queue::of(&device)?];
        for _ in 1..queues {
            let more = device.try_clone()?;
            more.set_nonblocking(true)?;
            opened.push(Queue::of(&more)?);
        }
        let udp = device.udp_gso();
        Ok((Self { device, udp }, opened))
    }

    /// The device's MTU in bytes.
    pub(crate) fn mtu(&self) -> io::Result<usize> {
        self.device.mtu().map(usize::from)
    }
}

/// True if a queue can no longer be read.
pub(crate) fn is_deleted(e: &io::Error) -> bool {
    let errno = e.raw_os_error().map(Errno::from_raw);
    matches!(errno, Some(Errno::EBADFD | Errno::EBADF | Errno::ENODEV | Errno::EIO))
}

/// One queue. The kernel keeps a flow on one queue, except when its other direction arrives by another one.
pub(crate) struct Queue(File);

impl Queue {
    fn of(device: &SyncDevice) -> io::Result<Self> {
        Ok(Self(File::from(device.as_fd().try_clone_to_owned()?)))
    }

    /// Reads a packet or an aggregate. None: nothing is waiting. The header is None if the kernel used a type that was not
    /// asked for.
    pub(crate) fn read<'a>(&mut self, buffer: &'a mut [u8]) -> io::Result<Option<(Option<Header>, &'a mut [u8])>> {
        let length = match self.0.read(buffer) {
            Ok(length) => length,
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(None),
            Err(e) => return Err(e),
        };
        match buffer[..length].split_first_chunk_mut() {
            Some((header, packet)) => Ok(Some((Header::parse(*header), packet))),
            None => Ok(Some((None, &mut []))),
        }
    }

    /// Writes a virtio header and the parts of a packet.
    pub(crate) fn write(&mut self, parts: &[IoSlice<'_>]) -> io::Result<()> {
        self.0.write_vectored(parts).map(drop)
    }
}

impl AsFd for Queue {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
