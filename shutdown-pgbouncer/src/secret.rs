//! Secrets in the forms that PostgreSQL and PgBouncer take.
//!
//! A SCRAM verifier holds a salt of its own, so PgBouncer can only log in to a server with the very verifier that stands there
//! (measured on 1.18 and 1.26): one is made, for `userlist.txt` and for `ALTER ROLE`, which stores it as it is.

use std::time::Duration;

use postgres_protocol::password;
use rustix::rand::{GetRandomFlags, getrandom};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use crate::console::said;
use crate::userlist::Secret;
use crate::{Error, UserName};

/// The letters of a password that needs no quotes anywhere: 64, so each byte gives six bits of chance.
const LETTERS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
/// 192 bits.
const LENGTH: usize = 32;

/// A new password of 32 letters, digits, `-` and `_`.
///
/// # Errors
///
/// The system has no random bytes to give.
pub fn generate() -> Result<String, Error> {
    let mut bytes = [0; LENGTH];
    let mut filled = 0;
    while filled < LENGTH {
        filled += getrandom(&mut bytes[filled..], GetRandomFlags::empty())
            .map_err(|source| Error::unwritten("a password", "made", source))?;
    }
    Ok(bytes.iter().map(|byte| char::from(LETTERS[usize::from(byte % 64)])).collect())
}

/// The SCRAM-SHA-256 verifier of a password, with a new salt (RFC 5803's content, in PostgreSQL's form).
///
/// # Errors
///
/// It is empty, or has a control character.
pub fn scram(password: &str) -> Result<Secret, String> {
    typed(password)?;
    Secret::new(password::scram_sha_256(password.as_bytes()))
}

/// The md5 hash of a password and its user, for servers that still have those. With a SCRAM server the login works and every query
/// fails.
///
/// # Errors
///
/// It is empty, or has a control character.
pub fn md5(user: &UserName, password: &str) -> Result<Secret, String> {
    typed(password)?;
    Secret::new(password::md5(password.as_bytes(), user.as_str()))
}

/// What no client could type, or no server would take, is no password.
fn typed(password: &str) -> Result<(), String> {
    if password.is_empty() {
        return Err("the password is empty".to_owned());
    }
    if password.chars().any(char::is_control) {
        return Err("the password has a control character".to_owned());
    }
    Ok(())
}

/// The statement that gives the role on the server the same secret.
pub fn alter_role(user: &UserName, secret: &Secret) -> String {
    let name = user.as_str().replace('"', "\"\"");
    let literal = secret.reveal().replace('\'', "''");
    format!("ALTER ROLE \"{name}\" PASSWORD '{literal}'")
}

/// How long the server may take to let us in, and then to run the statement.
const PATIENCE: Duration = Duration::from_secs(10);
/// And to hear that nobody waits any more.
const LAST_WORD: Duration = Duration::from_secs(1);

/// Runs a statement on a database server: a URL or `key=value` pairs, its password by `PGPASSWORD`. Without TLS: over a network that is not
/// trusted print the statement, and run it with `psql`.
///
/// # Errors
///
/// [`Error::Input`]: that is no server, or has a password. [`Error::Refused`]: it was cancelled before. [`Error::Unreachable`]: what the server said, without the statement, or
/// that it took too long to let us in. [`Error::Unverified`]: it did not answer to the statement, and may have run it.
///
/// # Cancel safety
///
/// Dropped, the statement may have been run.
pub(crate) async fn run(server: &str, statement: &str, cancelled: &CancellationToken) -> Result<(), Error> {
    // What is wrong with it may quote a password.
    let wrong = |_| Error::Input("write the server as postgres://USER@HOST:PORT/NAME".to_owned());
    let mut config: tokio_postgres::Config = server.parse().map_err(wrong)?;
    if config.get_password().is_some() {
        return Err(Error::Input(
            "the server's password does not go into its URL: set PGPASSWORD".to_owned(),
        ));
    }
    if let Ok(password) = std::env::var("PGPASSWORD") {
        config.password(password);
    }
    let refused = |why: &dyn std::fmt::Display| {
        Error::Unreachable(format!("the database server did not take the secret: {why}"))
    };
    let late = "it takes too long";
    let connecting = tokio::select! {
        biased;
        () = cancelled.cancelled() => return Err(Error::Refused("interrupted; nothing is changed".to_owned())),
        connecting = timeout(PATIENCE, config.connect(tokio_postgres::NoTls)) => connecting,
    };
    let connected = connecting.map_err(|_| refused(&late))?;
    let (client, connection) = connected.map_err(|error| refused(&said(&error)))?;
    let connection = tokio::spawn(connection);
    // From here on who hears nothing does not know.
    let unknown = |why: &dyn std::fmt::Display| {
        Error::Unverified(format!(
            "the database server may have the new secret, and PgBouncer has not: set it again ({why})"
        ))
    };
    let done = tokio::select! {
        biased;
        () = cancelled.cancelled() => Err(unknown(&"interrupted")),
        ran = timeout(PATIENCE, client.batch_execute(statement)) => match ran {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) if error.as_db_error().is_some() => Err(refused(&said(&error))),
            Ok(Err(error)) => Err(unknown(&said(&error))),
            Err(_) => Err(unknown(&late)),
        },
    };
    if done.is_err() {
        // What it waits for nobody waits for.
        let _ = timeout(LAST_WORD, client.cancel_token().cancel_query(tokio_postgres::NoTls)).await;
    }
    drop(client);
    let _ = timeout(LAST_WORD, connection).await;
    done
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn generated_passwords_are_long_plain_and_never_the_same() {
        let (one, other) = (generate().unwrap(), generate().unwrap());
        assert_ne!(one, other);
        assert!(one.len() == 32 && one.bytes().all(|byte| LETTERS.contains(&byte)), "{one}");
    }
}
