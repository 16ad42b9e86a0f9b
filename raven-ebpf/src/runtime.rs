//! What every object has: the licence that GPL-only helpers ask for, and a panic handler, which no program may ever reach
//! (the verifier refuses its loop).

#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

#[panic_handler]
fn panic(_info: &core::panic::PanicInfo) -> ! {
    loop {}
}
