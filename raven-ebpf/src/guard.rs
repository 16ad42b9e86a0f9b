//! The guard on a gateway node's uplink: WireGuard packets that cannot be ours, and handshake floods.
//!
//! Runs in [`crate::uplink_xdp`] where that is, else in [`crate::uplink_ingress`]; both hand over the same few bytes. What it
//! lets pass is not believed: WireGuard authenticates. It keeps garbage and floods away from the one core that would
//! have to refuse them.

use aya_ebpf::helpers::bpf_ktime_get_ns;
use raven_common::{
    Verdict,
    tables::{Handshakes, MAX_HANDSHAKES},
};

use crate::maps::HANDSHAKES;

/// The beginning of a UDP payload for the tunnel's port.
#[derive(Clone, Copy)]
pub struct Message {
    /// Outer source address.
    pub source: [u8; 4],
    /// Type, and three bytes that are zero (whitepaper §5.4).
    pub head: [u8; 4],
    /// Length of the payload, bytes; `None`: an aggregate, whose messages' lengths are not known.
    pub len: Option<u16>,
}

/// Types and lengths of WireGuard's messages (whitepaper §5.4.2 to §5.4.7).
const INITIATION: (u8, u16) = (1, 148);
const RESPONSE: (u8, u16) = (2, 92);
const COOKIE: (u8, u16) = (3, 64);
/// Data: header and authentication tag at least. The padding to a multiple of 16 (§5.4.6) is not asked for: boringtun, our
/// own engine, does not pad.
const DATA: (u8, u16) = (4, 32);

/// Why the message is to be dropped, if it is.
#[inline(always)]
pub fn refuse(message: &Message) -> Option<Verdict> {
    let [kind, reserved @ ..] = message.head;
    let plausible = reserved == [0; 3]
        && match message.len {
            Some(len) if kind == INITIATION.0 => len == INITIATION.1,
            Some(len) if kind == RESPONSE.0 => len == RESPONSE.1,
            Some(len) if kind == COOKIE.0 => len == COOKIE.1,
            Some(len) => kind == DATA.0 && len >= DATA.1,
            None => kind != 0 && kind <= DATA.0,
        };
    if !plausible {
        return Some(Verdict::DropNotWireguard);
    }
    (kind == INITIATION.0 && is_flood(message.source)).then_some(Verdict::DropHandshakeFlood)
}

/// Counts an initiation; true if its source has sent too many in this window.
#[inline(always)]
fn is_flood(source: [u8; 4]) -> bool {
    // SAFETY: a helper call without arguments.
    let window = unsafe { bpf_ktime_get_ns() } >> 30;
    let mut key = [0; 16];
    key[..4].copy_from_slice(&source);
    match HANDSHAKES.get_ptr_mut(&key) {
        Some(seen) => {
            // SAFETY: the map handed out a pointer that is valid until the program ends. Other CPUs may count at the same
            // time, or the entry may become another source's: a few initiations more or less get in, once.
            let seen = unsafe { &mut *seen };
            if seen.window != window {
                *seen = Handshakes { window, count: 0 };
            }
            seen.count += 1;
            seen.count > MAX_HANDSHAKES
        }
        None => {
            let _ = HANDSHAKES.insert(&key, Handshakes { window, count: 1 }, 0);
            false
        }
    }
}
