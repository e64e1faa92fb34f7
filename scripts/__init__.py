"""The commands that people type, in folders by purpose; lib/ holds what these scripts import."""
