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

use crate::maps::{self, PROXY};

/// `AF_INET` of linux/socket.h.
const INET: u32 = 2;
const TCP: u32 = 6;

/// Returns `SK_PASS` after assigning the listener or for other connections, `SK_DROP` if there is no listener.
#[inline(always)]
pub fn run(ctx: &SkLookupContext) -> u32 {
    // SAFETY: the kernel passes a valid context to the program; these are plain reads of it.
    let (family, protocol, address, port) =
        unsafe { ((*ctx.lookup).family, (*ctx.lookup).protocol, (*ctx.lookup).local_ip4, (*ctx.lookup).local_port) };
    if family != INET || protocol != TCP {
        return SK_PASS;
    }
    if !maps::is_kubelet(address.to_ne_bytes(), port as u16) {
        return SK_PASS;
    }
    match PROXY.redirect_sk_lookup(ctx, 0, 0) {
        Ok(()) => SK_PASS,
        Err(_) => SK_DROP,
    }
}
