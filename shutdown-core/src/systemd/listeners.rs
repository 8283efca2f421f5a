//! The sockets that systemd hands over, as `man sd_listen_fds` has it.

use std::io;
use std::net::TcpListener;

use listenfd::ListenFd;
use socket2::SockRef;

use super::SystemdError;
use crate::net;

/// The first descriptor (`SD_LISTEN_FDS_START`).
const FIRST: usize = 3;
/// More sockets than any service has; so that a wrong number is said and not tried.
const MOST: usize = 64;

/// A listener that systemd holds as well.
#[derive(Debug)]
pub(super) struct Inherited {
    /// Empty if it has none.
    pub(super) name: String,
    pub(super) listener: TcpListener,
}

/// Takes them all, so that none is handed on to a child.
pub(super) fn inherited() -> Result<Vec<Inherited>, SystemdError> {
    let variable = |name| std::env::var_os(name);
    let (Some(pid), Some(count)) = (variable("LISTEN_PID"), variable("LISTEN_FDS")) else {
        return Ok(Vec::new());
    };
    if pid.to_str().and_then(|pid| pid.parse().ok()) != Some(std::process::id()) {
        return Ok(Vec::new());
    }
    let wrong = |name, value, wanted| SystemdError::Variable { name, value, wanted };
    // listenfd would believe any number.
    let number: Option<usize> = count.to_str().and_then(|count| count.parse().ok());
    if number.is_none_or(|number| number > MOST) {
        return Err(wrong("LISTEN_FDS", count, "a number of sockets, 64 or less"));
    }
    // listenfd's own, which systemd does not know.
    if let Some(first) = variable("LISTEN_FDS_FIRST_FD").filter(|first| first != "3") {
        return Err(wrong("LISTEN_FDS_FIRST_FD", first, "nothing at all"));
    }
    let names = std::env::var("LISTEN_FDNAMES").unwrap_or_default();
    let mut names = names.split(':').map(str::to_owned);
    let mut sockets = ListenFd::from_env();
    (0..sockets.len())
        .map(|index| {
            let name = names.next().unwrap_or_default();
            match take(&mut sockets, index) {
                Ok(listener) => Ok(Inherited { name, listener }),
                Err(source) => Err(SystemdError::Listener { fd: FIRST + index, name, source }),
            }
        })
        .collect()
}

fn take(sockets: &mut ListenFd, index: usize) -> io::Result<TcpListener> {
    let listener = sockets.take_tcp_listener(index)?.expect("each is taken once");
    if !SockRef::from(&listener).is_listener()? {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "it does not listen"));
    }
    listener.set_nonblocking(true)?;
    net::note_shared(&listener)?;
    Ok(listener)
}
