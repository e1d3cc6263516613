"""What comes out: the soup, its report and card, its push to the Hub, and how it is cooked again."""
