//! Parts of every object: the license that GPL-only helpers require, and a panic handler. No program may reach the
//! handler; the verifier rejects its loop.

#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

#[panic_handler]
fn panic(_info: &core::panic::PanicInfo) -> ! {
    loop {}
}
