//! The control of the mDNS tests: mdns-sd as it is, told what to do by lines of stdin.
//!
//! `register NAME HOST PORT`, `unregister NAME`, `shutdown`, `exit`. Its arguments are its interfaces. Prints "announced
//! NAME" and "done". Started inside a network namespace only.

use std::error::Error;

use mdns_sd::{DaemonEvent, IfKind, ServiceDaemon, ServiceInfo};

const SERVICE: &str = "_edge._tcp.local.";

fn main() -> Result<(), Box<dyn Error>> {
    let daemon = ServiceDaemon::new()?;
    daemon.disable_interface(IfKind::All)?;
    daemon.enable_interface(std::env::args().skip(1).map(IfKind::Name).collect::<Vec<_>>())?;
    let monitor = daemon.monitor()?;
    std::thread::spawn(move || {
        while let Ok(event) = monitor.recv() {
            if let DaemonEvent::Announce(name, whence) = event {
                println!("announced {name} {whence}");
            }
        }
    });
    for line in std::io::stdin().lines() {
        let line = line?;
        let words: Vec<_> = line.split(' ').collect();
        match words[..] {
            ["register", name, host, port] => {
                let properties = [("node_id", name), ("inc", "1")];
                let host = format!("{host}.local.");
                let info = ServiceInfo::new(SERVICE, name, &host, "", port.parse()?, &properties[..])?;
                daemon.register(info.enable_addr_auto())?;
            }
            ["unregister", name] => _ = daemon.unregister(&format!("{name}.{SERVICE}"))?.recv()?,
            ["shutdown"] => _ = daemon.shutdown()?.recv()?,
            ["exit"] => return Ok(()),
            _ => return Err(format!("what is {line}?").into()),
        }
        println!("done {line}");
    }
    Ok(())
}
