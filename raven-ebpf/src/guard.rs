//! The guard on the uplink of a node with a tunnel: drops packets to the tunnel's port that are not
//! WireGuard, and handshake floods.
//!
//! Runs in [`mod@crate::uplink_xdp`] if that program is attached, else in [`mod@crate::uplink_ingress`]. The guard
//! authenticates nothing, which is WireGuard's task; it keeps invalid packets and floods away from the one core that
//! would have to reject them. An initiation has to be made for this node's public key before it counts towards the limit
//! of its source: otherwise garbage from a peer's forged address would keep that peer from starting a session. The check costs
//! more than a drop by the limit, and far less than WireGuard's own.

use aya_ebpf::helpers::bpf_ktime_get_ns;
use raven_common::{
    Verdict,
    mac1::Initiation,
    tables::{Handshakes, MAX_HANDSHAKES},
};

use crate::maps::{self, HANDSHAKES};

/// The fields of a UDP packet to the tunnel's port that the guard checks.
#[derive(Clone, Copy)]
pub struct Message {
    /// Outer source address, as [`HANDSHAKES`] has it.
    pub source: [u8; 16],
    /// Message type, then three reserved zero bytes (WireGuard whitepaper §5.4).
    pub head: [u8; 4],
    /// Length of the UDP payload in bytes; of an aggregate, that of its first message. All but the last are as long.
    pub len: u16,
    /// Number of messages in the packet.
    pub count: u32,
}

/// Type and length of WireGuard's handshake messages (whitepaper §5.4.2 to §5.4.7).
const INITIATION: (u8, u16) = (1, 148);
const RESPONSE: (u8, u16) = (2, 92);
const COOKIE: (u8, u16) = (3, 64);
/// Type and minimum length of data messages: header and authentication tag. The guard does not require the padding to a
/// multiple of 16 (§5.4.6), because some implementations (boringtun) do not pad.
const DATA: (u8, u16) = (4, 32);

/// Returns the reason to drop the message, or `None` to accept it. `read` copies the message if it is an initiation; it
/// returns `None` if the packet is too short.
#[inline(always)]
pub fn refuse(message: &Message, read: impl FnOnce(&mut Initiation) -> Option<()>) -> Option<Verdict> {
    let [kind, reserved @ ..] = message.head;
    let found = (kind, message.len);
    let is_handshake = found == INITIATION || found == RESPONSE || found == COOKIE;
    let is_data = kind == DATA.0 && message.len >= DATA.1;
    if reserved != [0; 3] || !(is_handshake || is_data) {
        return Some(Verdict::DropNotWireguard);
    }
    if kind != INITIATION.0 {
        return None;
    }
    // Of an aggregate, the first message is checked.
    if let (Some(key), Some(check)) = (maps::mac1_key(), maps::mac1_check()) {
        // SAFETY: this CPU's own entry, which always exists; programs on ingress do not interrupt each other on a CPU.
        let check = unsafe { &mut *check };
        if read(&mut check.initiation).is_none() {
            return Some(Verdict::DropNotWireguard);
        }
        if !key.accepts(check) {
            return Some(Verdict::DropWrongKey);
        }
    }
    is_flood(message).then_some(Verdict::DropHandshakeFlood)
}

/// Counts initiations. Returns true if their source exceeds the limit of this window.
#[inline(always)]
fn is_flood(message: &Message) -> bool {
    let count = u64::from(message.count);
    // SAFETY: a helper call without arguments.
    let window = unsafe { bpf_ktime_get_ns() } >> 30;
    match HANDSHAKES.get_ptr_mut(&message.source) {
        Some(entry) => {
            // SAFETY: the map returned a pointer that is valid until the program ends. Other CPUs may update the entry
            // concurrently, or it may be reused for another source; both change the count by a few initiations at most.
            let entry = unsafe { &mut *entry };
            if entry.window != window {
                *entry = Handshakes { window, count: 0 };
            }
            entry.count += count;
            entry.count > MAX_HANDSHAKES
        }
        None => {
            let _ = HANDSHAKES.insert(&message.source, Handshakes { window, count }, 0);
            false
        }
    }
}
