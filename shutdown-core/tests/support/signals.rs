//! What a test's children do with stop signals.

use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Once};

use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM};
use signal_hook::flag::register_conditional_default;

/// Lets children start with the default action for every stop signal, however this process was started: a shell's
/// background job ignores INT and QUIT, and exec hands on what is ignored, but not what is handled.
pub(crate) fn default_signals() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        for number in [SIGHUP, SIGINT, SIGQUIT, SIGTERM] {
            let default = Arc::new(AtomicBool::new(true));
            register_conditional_default(number, default).expect("a signal that can be handled");
        }
    });
}
