//! sk_lookup on cloud gateway nodes: connections to a kubelet of another pool, addressed by that node's IP, are
//! assigned to the proxy's listener.
//!
//! Local routes on the node deliver these connections to its own stack (`raven-agent/src/link/interception.rs`), both
//! forwarded ones and those of the node's own processes and pods; no TC hook sees all of them. The program runs once
//! per connection, for the SYN.
//!
//! Without a listener (no agent runs) the program drops the SYN; the client retransmits it a second later. The SYN must
//! not reach another socket: the gateway node's own kubelet listens on the same port.

use aya_ebpf::{
    bindings::sk_action::{SK_DROP, SK_PASS},
    programs::SkLookupContext,
};

use crate::{
    forward,
    maps::{self, PROXY},
};

/// `AF_INET` and `AF_INET6` of linux/socket.h.
const INET: u32 = 2;
const INET6: u32 = 10;
const TCP: u32 = 6;

/// Returns `SK_PASS` after assigning the listener or for other connections, `SK_DROP` if there is no listener.
#[inline(always)]
pub fn run(ctx: &SkLookupContext) -> u32 {
    let lookup = ctx.lookup;
    // SAFETY: the kernel passes a valid context to the program; these are plain reads of it.
    let (family, protocol, port) = unsafe { ((*lookup).family, (*lookup).protocol, (*lookup).local_port as u16) };
    if protocol != TCP {
        return SK_PASS;
    }
    let is_kubelet = match family {
        // SAFETY: a plain read of the valid context.
        INET => maps::is_kubelet(unsafe { (*lookup).local_ip4 }.to_ne_bytes(), port),
        // SAFETY: a plain read of the valid context.
        INET6 => maps::is_kubelet6(forward::bytes(unsafe { (*lookup).local_ip6 }), port),
        _ => false,
    };
    if !is_kubelet {
        return SK_PASS;
    }
    match PROXY.redirect_sk_lookup(ctx, 0, 0) {
        Ok(()) => SK_PASS,
        Err(_) => SK_DROP,
    }
}
